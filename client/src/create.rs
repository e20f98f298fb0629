//! Making and dropping keyspaces.

use crate::client::Client;
use crate::error::Error;
use crate::keyspace::Keyspace;
use crate::point::Call;
use shkv_proto::limits::MAP_SHARDS_MAX;
use shkv_proto::map::Part;
use shkv_proto::message::{Admin, NewShard, RefusalCode};
use shkv_proto::rows::Shards;
use std::future::IntoFuture;

/// Shards of a keyspace that is not told how many.
const SHARDS_DEFAULT: u32 = 8;
/// Copies of each shard of a keyspace that is not told how many.
const REPLICAS_DEFAULT: u32 = 3;

/// A keyspace that is not yet made; see [`Client::create_keyspace`]. Awaiting it gives the [`Keyspace`].
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let users = client.create_keyspace("users").shards(16).replicas(5).await?;
/// users.put("ada", "1815").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a keyspace is made when it is awaited"]
pub struct NewKeyspace {
    client: Client,
    name: String,
    replicas: u32,
    cut: Cut,
}

/// How the keys are cut into shards.
#[derive(Debug)]
enum Cut {
    Hash(u32),
    Ranges(Shards),
    At(Vec<Vec<u8>>),
}

impl NewKeyspace {
    /// Cuts it by hash into so many shards; 8 unless said otherwise. Any key may come, and the load is even.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let users = client.create_keyspace("users").shards(32).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn shards(mut self, count: u32) -> Self {
        self.cut = Cut::Hash(count);
        self
    }

    /// Cuts it by ranges of ids, for rows that keep to a schema; see [`crate::table`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// use shkv_client::table::{RangeShard, Shards};
    ///
    /// let shard = |name: &str, low| RangeShard { name: name.into(), low, size: 4096 };
    /// let shards = Shards::new(vec![shard("sh1", 0), shard("sh2", 4096)])?;
    /// let students = client.create_keyspace("students").ranges(&shards).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn ranges(mut self, shards: &Shards) -> Self {
        self.cut = Cut::Ranges(shards.clone());
        self
    }

    /// Cuts it by ranges of keys: one shard before the first of these keys, one from each of them on. The rows of a range
    /// then lie in one shard, or in a few that follow on each other, so that a scan asks fewer shards than where keys are hashed;
    /// but keys that are near each other are written to the same shard.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let log = client.create_keyspace("log").split_at(["2026-04", "2026-07", "2026-10"]).await?; // four shards
    /// # Ok(())
    /// # }
    /// ```
    pub fn split_at<K: AsRef<[u8]>>(mut self, keys: impl IntoIterator<Item = K>) -> Self {
        self.cut = Cut::At(keys.into_iter().map(|key| key.as_ref().to_vec()).collect());
        self
    }

    /// Copies of each shard, 1 to 9; 3 unless said otherwise. Where there are fewer nodes there are fewer copies, until
    /// more nodes come.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let scratch = client.create_keyspace("scratch").replicas(1).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn replicas(mut self, count: u32) -> Self {
        self.replicas = count;
        self
    }

    async fn make(self) -> Result<Keyspace, Error> {
        let parts = match &self.cut {
            Cut::Hash(count) if *count == 0 || *count as usize > MAP_SHARDS_MAX => {
                let text = format!("{count} shards are wanted; 1 to {MAP_SHARDS_MAX} can be");
                return Err(Error::refused(RefusalCode::Malformed, text));
            }
            Cut::Hash(count) => Part::hash_split(*count),
            Cut::At(keys) => parts_at(keys)?,
            Cut::Ranges(shards) => shards.parts().into_iter().map(|(part, _)| part).collect(),
        };
        let shards = parts.into_iter().map(|part| NewShard { part, pinned: vec![] }).collect();
        let wish = Admin::CreateKeyspace { name: self.name.clone(), replicas: self.replicas, shards };
        self.client.admin(&wish).await?;
        self.client.keyspace(&self.name).await
    }
}

/// Ranges that begin at these keys, and one before the first.
fn parts_at(keys: &[Vec<u8>]) -> Result<Vec<Part>, Error> {
    if keys.len() >= MAP_SHARDS_MAX {
        let text = format!("{} shards are wanted; 1 to {MAP_SHARDS_MAX} can be", keys.len() + 1);
        return Err(Error::refused(RefusalCode::Malformed, text));
    }
    let follows = |pair: &[Vec<u8>]| pair[0] < pair[1];
    if keys.first().is_some_and(Vec::is_empty) || !keys.windows(2).all(follows) {
        let text = "keys to split at must not be empty, and each must be greater than the one before";
        return Err(Error::refused(RefusalCode::Malformed, text));
    }
    let starts = std::iter::once(Vec::new()).chain(keys.iter().cloned());
    let ends = keys.iter().cloned().map(Some).chain([None]);
    Ok(starts.zip(ends).map(|(start, end)| Part::Range { start, end }).collect())
}

impl IntoFuture for NewKeyspace {
    type Output = Result<Keyspace, Error>;
    type IntoFuture = Call<Keyspace>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.make())
    }
}

impl Client {
    /// Makes a keyspace. Await it.
    ///
    /// # Errors
    /// When it is awaited: [`Error::Refused`], with [`RefusalCode::Exists`] if there is one of this name, or as
    /// [`Client::admin`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let users = client.create_keyspace("users").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn create_keyspace(&self, name: &str) -> NewKeyspace {
        let cut = Cut::Hash(SHARDS_DEFAULT);
        NewKeyspace { client: self.clone(), name: name.to_owned(), replicas: REPLICAS_DEFAULT, cut }
    }

    /// Drops a keyspace with all its rows. `default` stays.
    ///
    /// # Errors
    /// [`Error::Refused`], with [`RefusalCode::NotFound`] if there is none of this name, or as [`Client::admin`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.drop_keyspace("users").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn drop_keyspace(&self, name: &str) -> Result<(), Error> {
        self.admin(&Admin::DropKeyspace { name: name.to_owned() }).await.map(drop)
    }
}
