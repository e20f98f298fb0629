//! What the log and, in tests, redb need of a file system, as narrow as can be, so that a test can stand in for it with one that tears
//! writes, loses what was not synced, fills up or fails to sync.

use std::io;
use std::sync::Arc;

/// A folder of files.
pub trait Disk: Send + Sync {
    /// Makes a file of this many zero bytes, written out, not only promised, and synced: later writes inside it cannot run
    /// out of space, and syncing them need not sync the file's length.
    ///
    /// # Errors
    /// The system's; when there is no space, nothing is left behind.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file, replacing none that is still needed, and syncs the folder.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// The names of all files.
    ///
    /// # Errors
    /// The system's.
    fn list(&self) -> io::Result<Vec<String>>;
}

/// A file of a [`Disk`].
pub trait DiskFile: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// The system's; also when the file ends first.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Returns when everything written so far is on the disk.
    ///
    /// # Errors
    /// The system's. After an error it is not known what is on the disk, and asking again would not tell.
    fn sync(&self) -> io::Result<()>;

    /// Bytes in the file.
    ///
    /// # Errors
    /// The system's.
    fn bytes(&self) -> io::Result<u64>;

    /// Makes the file this long; what is new is zero.
    ///
    /// # Errors
    /// The system's.
    fn resize(&self, bytes: u64) -> io::Result<()>;
}

/// Bytes of what nobody waits for that are written before the disk is waited for, so that the log's next write never finds
/// it with much to do: about what it takes in some five milliseconds.
pub const UNSYNCED_BYTES_MAX: u64 = 512 << 10;

pub use real::{RealDisk, sync_folder};

mod real {
    #![expect(clippy::disallowed_methods, reason = "a shell: this is the door to the file system")]

    use super::{Disk, DiskFile, UNSYNCED_BYTES_MAX};
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    /// What a new file is filled with, piece by piece. The system keeps what was written at once in one piece of its cache, and
    /// each later write and sync of a few bytes looks through all the blocks of its piece: with 1 MiB a sync costs 1.2 times as long, and
    /// 1.4 times the processor.
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

    /// A folder of the system.
    #[derive(Debug)]
    pub struct RealDisk(pub PathBuf);

    /// Returns when the names in a folder are on the disk: a file that was synced can be lost with its name.
    ///
    /// # Errors
    /// The system's.
    pub fn sync_folder(folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    impl Disk for RealDisk {
        fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
            let path = self.0.join(name);
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
            let fill = || {
                let mut offset = 0;
                while offset < bytes {
                    let piece = (bytes - offset).min(ZEROES.len() as u64) as usize;
                    file.write_all_at(&ZEROES[..piece], offset)?;
                    offset += piece as u64;
                    if offset.is_multiple_of(UNSYNCED_BYTES_MAX) {
                        DiskFile::sync(&file)?;
                    }
                }
                file.sync_all()?;
                sync_folder(&self.0)
            };
            if let Err(error) = fill() {
                let _ = std::fs::remove_file(&path);
                return Err(error);
            }
            Ok(Arc::new(file))
        }

        fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
            Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.0.join(name))?))
        }

        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            std::fs::rename(self.0.join(from), self.0.join(to))?;
            sync_folder(&self.0)
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            std::fs::remove_file(self.0.join(name))
        }

        fn list(&self) -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.0)? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            Ok(names)
        }
    }

    impl DiskFile for File {
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.write_all_at(bytes, offset)
        }

        fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            self.read_exact_at(bytes, offset)
        }

        fn sync(&self) -> io::Result<()> {
            rustix::fs::fdatasync(self).map_err(Into::into)
        }

        fn bytes(&self) -> io::Result<u64> {
            Ok(self.metadata()?.len())
        }

        fn resize(&self, bytes: u64) -> io::Result<()> {
            self.set_len(bytes)
        }
    }
}
