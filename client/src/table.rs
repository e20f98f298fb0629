//! Rows that keep to a schema: typed columns, found by an id, in shards that are ranges of ids. The HTTP front end's
//! database keeps its rows in the same form.
//!
//! ```no_run
//! # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
//! use shkv_client::table::{Dtype, RangeShard, Schema, Shards, Value};
//!
//! let schema = Schema::new(vec!["id".into(), "name".into()], vec![Dtype::Number, Dtype::String], "id")?;
//! let shard = |name: &str, low| RangeShard { name: name.into(), low, size: 4096 };
//! let shards = Shards::new(vec![shard("sh1", 0), shard("sh2", 4096)])?;
//! let students = client.create_keyspace("students").ranges(&shards).await?.table(schema).within(shards);
//!
//! let ada = students.row([("id", Value::from(2255)), ("name", "Ada".into())])?;
//! students.insert(&[ada]).await?; // refused if there is a row 2255 already
//! let mut rows = students.range(1000..=8889);
//! while let Some(row) = rows.next().await? {
//!     println!("{:?}", row.values());
//! }
//! # Ok(())
//! # }
//! ```

use crate::check::Check;
use crate::error::Error;
use crate::keyspace::Keyspace;
use crate::point::Written;
use crate::scan;
use crate::txn::Committed;
use shkv_proto::message::RefusalCode;
use shkv_proto::rows::{self, RowWrite};
use std::ops::RangeInclusive;
use std::sync::Arc;

pub use shkv_proto::rows::{Dtype, ID_MAX, RangeShard, Row, RowsError, Schema, Shards, Value};

impl From<RowsError> for Error {
    fn from(error: RowsError) -> Self {
        Self::refused(RefusalCode::Malformed, error.to_string())
    }
}

impl Keyspace {
    /// This keyspace as a table of rows of a schema. Nothing is asked; the schema is the application's to remember.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client, schema: shkv_client::table::Schema) -> Result<(), shkv_client::Error> {
    /// let students = client.keyspace("students").await?.table(schema);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn table(&self, schema: Schema) -> Table {
        Table { keyspace: self.clone(), schema: Arc::new(schema), shards: None }
    }
}

/// A keyspace whose rows keep to a schema. Cloning it is cheap.
///
/// ```no_run
/// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
/// println!("{:?}", students.get(2255).await?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Table {
    keyspace: Keyspace,
    schema: Arc<Schema>,
    shards: Option<Arc<Shards>>,
}

impl Table {
    /// Refuses rows whose ids lie in none of these ranges.
    ///
    /// ```no_run
    /// # fn example(students: shkv_client::table::Table, shards: shkv_client::table::Shards) {
    /// let students = students.within(shards);
    /// # }
    /// ```
    #[must_use]
    pub fn within(mut self, shards: Shards) -> Self {
        self.shards = Some(Arc::new(shards));
        self
    }

    /// Its schema.
    ///
    /// ```no_run
    /// # fn example(students: shkv_client::table::Table) {
    /// println!("{:?}", students.schema().columns());
    /// # }
    /// ```
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// A row of these named values: each column once, and no other.
    ///
    /// # Errors
    /// [`Error::Refused`] names the column that is missing, unknown, there twice, or of another type.
    ///
    /// ```no_run
    /// # fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// let ada = students.row([("id", 2255.into()), ("name", "Ada".into())])?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn row<K: Into<String>>(&self, named: impl IntoIterator<Item = (K, Value)>) -> Result<Row, Error> {
        let mut columns = std::collections::BTreeMap::new();
        for (column, value) in named {
            let column = column.into();
            if columns.insert(column.clone(), value).is_some() {
                return Err(RowsError::Row(format!("{column} is there twice")).into());
            }
        }
        Ok(self.schema.row(columns)?)
    }

    /// Inserts rows in one step, over as many shards as they touch: all of them, or none if one is there already.
    ///
    /// # Errors
    /// [`Error::Condition`] with the position of the row that is there already, [`Error::Refused`] with the row that no
    /// shard holds or that is there twice, or as [`crate::Txn::commit`].
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// let row = |id: i64, name: &str| students.row([("id", id.into()), ("name", name.into())]);
    /// students.insert(&[row(1, "Ada")?, row(5000, "Bob")?]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn insert(&self, rows: &[Row]) -> Result<Committed, Error> {
        let mut txn = self.keyspace.txn();
        for RowWrite { key, value, condition } in rows::inserts(&self.schema, self.shards.as_deref(), rows)? {
            txn = txn.put_if(key, value.unwrap_or_default(), Check::from(condition));
        }
        txn.commit().await
    }

    /// Writes a row in the place of the one that is there.
    ///
    /// # Errors
    /// [`Error::Condition`] if there is no such row, or as [`crate::Put`].
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// students.update(&students.row([("id", 2255.into()), ("name", "Lady Ada".into())])?).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update(&self, row: &Row) -> Result<Written, Error> {
        let RowWrite { key, value, condition } = rows::update(&self.schema, row);
        self.keyspace.put(key, value.unwrap_or_default()).check(condition.into()).await
    }

    /// Removes a row that is there.
    ///
    /// # Errors
    /// [`Error::Condition`] if there is no such row, or as [`crate::Delete`].
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// students.delete(2255).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete(&self, id: u64) -> Result<Written, Error> {
        let RowWrite { key, condition, .. } = rows::removal(id);
        self.keyspace.delete(key).check(condition.into()).await
    }

    /// Reads a row, linearizably.
    ///
    /// # Errors
    /// [`Error::Refused`] for bytes that are no row of this schema, or as [`crate::Get`].
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// let found = students.get(2255).await?.is_some();
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, id: u64) -> Result<Option<Row>, Error> {
        let found = self.keyspace.get(rows::key_of(id)).await?;
        Ok(found.map(|found| self.schema.decode(&found.value)).transpose()?)
    }

    /// Reads rows in the order of their ids, page by page; both ends are included.
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// let mut rows = students.range(1000..=8889);
    /// while let Some(row) = rows.next().await? {
    ///     println!("{:?}", row.values());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn range(&self, ids: RangeInclusive<u64>) -> TableRows {
        let rows = match ids.is_empty() {
            true => None,
            false => {
                let (start, end) = rows::span(*ids.start(), *ids.end());
                Some(match end {
                    Some(end) => self.keyspace.scan(start..end).rows(),
                    None => self.keyspace.scan(start..).rows(),
                })
            }
        };
        TableRows { rows, schema: self.schema.clone() }
    }
}

/// Rows of a table in the order of their ids; see [`Table::range`].
///
/// ```no_run
/// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
/// let first = students.range(0..=99).next().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TableRows {
    /// Nothing for a range without ids.
    rows: Option<scan::Rows>,
    schema: Arc<Schema>,
}

impl TableRows {
    /// The next row, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Refused`] for bytes that are no row of this schema, or as [`crate::Rows::next`].
    ///
    /// ```no_run
    /// # async fn example(students: shkv_client::table::Table) -> Result<(), shkv_client::Error> {
    /// let first = students.range(0..=99).next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next(&mut self) -> Result<Option<Row>, Error> {
        let Some(rows) = &mut self.rows else { return Ok(None) };
        let found = rows.next().await?;
        Ok(found.map(|found| self.schema.decode(&found.value)).transpose()?)
    }
}
