//! What a node stands on: its data directory. [`Folder`] is one of the system; a simulation stands in for it with one that
//! tears writes, loses what was not synced, fills up or fails.

#![expect(clippy::disallowed_methods, reason = "a shell: this is the door to the data directory")]

use crate::StartError;
use crate::disk::{Disk, RealDisk, sync_folder};
use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const IDENTITY: &str = "identity";
const LOCK: &str = "lock";
/// How often the lock is tried: somebody who only looks holds it for a moment.
const LOCK_TRIES: u32 = 5;
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A data directory.
pub trait Ground: Send + Sync {
    /// What it is called in messages.
    fn path(&self) -> &Path;

    /// Makes it if it is missing, and keeps all others out until what is returned is dropped.
    ///
    /// # Errors
    /// [`StartError`].
    fn lock(&self) -> Result<Box<dyn Any + Send + Sync>, StartError>;

    /// The identity that is kept in it.
    ///
    /// # Errors
    /// The system's.
    fn identity(&self) -> io::Result<Option<Vec<u8>>>;

    /// Puts an identity in the place of the old one: there is a whole one at every moment, and this one for good when it
    /// returns.
    ///
    /// # Errors
    /// The system's.
    fn set_identity(&self, bytes: &[u8]) -> io::Result<()>;

    /// Where the log is.
    ///
    /// # Errors
    /// The system's.
    fn log(&self) -> io::Result<Arc<dyn Disk>>;

    /// Where the rows are.
    fn rows(&self) -> Arc<dyn Disk>;

    /// Makes the names of what was made in it durable.
    ///
    /// # Errors
    /// The system's.
    fn sync_names(&self) -> io::Result<()>;

    /// How much is free. A file system that does not say counts as empty.
    fn free_bytes(&self) -> u64;
}

/// A directory of the system.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Ground for Folder {
    fn path(&self) -> &Path {
        &self.0
    }

    fn lock(&self) -> Result<Box<dyn Any + Send + Sync>, StartError> {
        let at = |what: &'static str| move |error| StartError::Data { data: self.0.clone(), what, error };
        std::fs::create_dir_all(&self.0).map_err(at("cannot be made"))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.0.join(LOCK))
            .map_err(at("cannot be written to"))?;
        let mut tries = 1;
        while let Err(error) = try_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            if tries == LOCK_TRIES {
                tracing::debug!("{}: {error}", self.0.display());
                return Err(StartError::Locked(self.0.clone()));
            }
            tries += 1;
            std::thread::sleep(LOCK_RETRY);
        }
        Ok(Box::new(lock))
    }

    fn identity(&self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        match File::open(self.0.join(IDENTITY)) {
            Ok(mut file) => file.read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(bytes))
    }

    fn set_identity(&self, bytes: &[u8]) -> io::Result<()> {
        let beside = self.0.join("identity.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, self.0.join(IDENTITY))?;
        sync_folder(&self.0)
    }

    fn log(&self) -> io::Result<Arc<dyn Disk>> {
        let folder = self.0.join("log");
        std::fs::create_dir_all(&folder)?;
        Ok(Arc::new(RealDisk(folder)))
    }

    fn rows(&self) -> Arc<dyn Disk> {
        Arc::new(RealDisk(self.0.clone()))
    }

    fn sync_names(&self) -> io::Result<()> {
        sync_folder(&self.0)?;
        match self.0.parent().filter(|parent| !parent.as_os_str().is_empty()).map(sync_folder) {
            // A parent that this user may not open was not where this process made the directory.
            Some(Err(error)) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
            Some(_) | None => Ok(()),
        }
    }

    fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.0).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl Folder {
    /// Whether a process holds it.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        match File::open(self.0.join(LOCK)) {
            Ok(lock) => try_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_err(),
            Err(_) => false,
        }
    }
}

fn try_lock(lock: &File, operation: rustix::fs::FlockOperation) -> io::Result<()> {
    Ok(rustix::fs::flock(lock, operation)?)
}
