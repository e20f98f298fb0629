//! How far a load has come, kept in a small file next to its input, so that a later load can go on there.

#![expect(clippy::disallowed_methods, reason = "a shell: reads the beginning of the input")]

use serde::{Deserialize, Serialize};
use shkv_proto::hashing::key_hash;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The number of this file's form.
const FORMAT: u32 = 1;
/// Bytes at the beginning of the input by which it is known again.
const HEAD_BYTES: u64 = 64 << 10;
/// Longest progress file that is read.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What an input is known by, and where its rows go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its size.
    pub input_bytes: u64,
    /// xxh3-64 of its first 64 KiB.
    pub input_head_hash: String,
    /// The cluster that it is loaded into.
    pub cluster: String,
    /// The keyspace that it is loaded into.
    pub keyspace: String,
}

/// A place in the input before which every row is acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    format: u32,
    /// Whose progress it is.
    pub identity: Identity,
    /// Bytes of the input.
    pub offset: u64,
    /// Lines of the input.
    pub lines: u64,
}

impl Identity {
    /// Of a file that is loaded into a keyspace.
    pub fn of(file: &Path, cluster: String, keyspace: String) -> std::io::Result<Self> {
        let input = File::open(file)?;
        let input_bytes = input.metadata()?.len();
        let mut head = Vec::new();
        input.take(HEAD_BYTES).read_to_end(&mut head)?;
        Ok(Self { input_bytes, input_head_hash: format!("{:016x}", key_hash(&head)), cluster, keyspace })
    }
}

impl Progress {
    /// Of an input whose first `offset` bytes, `lines` lines, are loaded.
    pub fn new(identity: Identity, offset: u64, lines: u64) -> Self {
        Self { format: FORMAT, identity, offset, lines }
    }

    /// Reads the file; `None` if there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, String> {
        let shown = path.display();
        let mut bytes = Vec::new();
        match File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("cannot read the progress file {shown}: {error}")),
        }
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(progress) if progress.format == FORMAT => Ok(Some(progress)),
            Ok(progress) => Err(format!("{shown} has form {}, this build knows form {FORMAT}", progress.format)),
            Err(error) => Err(format!("{shown} is no progress file: {error}; remove it to load from the beginning")),
        }
    }

    /// Writes the file in one step: a load that is killed leaves the old or the new one.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let error = |error: std::io::Error| format!("cannot write the progress file {}: {error}", path.display());
        let text = serde_json::to_vec(self).map_err(|why| error(why.into()))?;
        let beside = beside(path, ".new");
        fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).map_err(error)
    }

    /// Removes the file: the load is done.
    pub fn remove(path: &Path) -> Result<(), String> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(format!("cannot remove the progress file {}: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The path with something put behind its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_a_stranger_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.shkv-progress");
        assert_eq!(Progress::read(&path), Ok(None));
        fs::write(directory.path().join("rows"), b"k\tv\n").unwrap();
        let identity = Identity::of(&directory.path().join("rows"), "c".into(), "default".into()).unwrap();
        assert_eq!(identity.input_bytes, 4);
        let progress = Progress::new(identity, 4, 1);
        progress.write(&path).unwrap();
        assert_eq!(Progress::read(&path), Ok(Some(progress)));
        fs::write(&path, b"something else").unwrap();
        assert!(Progress::read(&path).unwrap_err().contains("no progress file"));
        Progress::remove(&path).unwrap();
        Progress::remove(&path).unwrap();
    }
}
