//! A disk: it loses what was not synced when the power goes, tears writes at the grain of its sectors, fills up, fails to
//! sync, can lose its power in the middle of what it does, and rots.
//!
//! Only the log rots here. redb looks at the checks of its pages when it repairs a file, not when it reads one, so a bit
//! that turns in its file need not be noticed; and the last write of the log cannot be told from a torn one.
//!
//! What was renamed or synced is there for good. A file that was removed may be back, as long as no name was synced since.

use super::file::File;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_node::StartError;
use shkv_node::disk::{Disk, DiskFile};
use shkv_node::ground::Ground;
use shkv_proto::world::sim::Trace;
use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest read that is taken for one of a single record.
const RECORD_READ_BYTES_MAX: usize = 4096;

/// The folder of the log, and what its segments in use are called.
const LOG: &str = "log/";
const SEGMENT: &str = ".log";

/// A disk with the data directory of one node.
#[derive(Clone)]
pub struct SimDisk(Arc<Inside>);

struct Inside {
    path: PathBuf,
    state: Mutex<State>,
    trace: Arc<Trace>,
}

struct State {
    rng: SmallRng,
    identity: Option<Vec<u8>>,
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, File>,
    last_file: u64,
    /// Files whose removal may be undone.
    removed: Vec<(String, u64)>,
    capacity: u64,
    /// Handles of an earlier process are of no use.
    life: u64,
    /// Writes and syncs after which the power goes, and whether only those of the rows count.
    power_for: Option<(u64, bool)>,
    power: bool,
    /// During what the power went, since that was last asked.
    dark_at: Option<&'static str>,
    fail_sync: bool,
    rot_next_read: bool,
    /// The file of the log with the last write that was synced.
    last_log: Option<u64>,
    stats: DiskStats,
}

/// What a disk has done.
#[derive(Clone, Copy, Default, Debug)]
pub struct DiskStats {
    /// Syncs.
    pub syncs: u64,
    /// Writes.
    pub writes: u64,
    /// Sectors that were lost when the power went.
    pub lost_sectors: u64,
    /// Syncs that failed on purpose.
    pub failed_syncs: u64,
    /// Writes that found no space.
    pub full: u64,
    /// Reads of the log at a start that brought something else than was written.
    pub rotten_starts: u64,
    /// Reads of a single entry that did.
    pub rotten_reads: u64,
    /// Bits of the log that turned for good.
    pub rotten: u64,
    /// Segments of the log that were opened.
    pub segments: u64,
    /// Segments of the log that were let go.
    pub released: u64,
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(path: PathBuf, seed: u64, capacity: u64, trace: Arc<Trace>) -> Self {
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            identity: None,
            names: BTreeMap::new(),
            files: BTreeMap::new(),
            last_file: 0,
            removed: vec![],
            capacity,
            life: 0,
            power_for: None,
            power: true,
            dark_at: None,
            fail_sync: false,
            rot_next_read: false,
            last_log: None,
            stats: DiskStats::default(),
        };
        Self(Arc::new(Inside { path, state: Mutex::new(state), trace }))
    }

    /// What it is called.
    #[must_use]
    pub fn path_buf(&self) -> PathBuf {
        self.0.path.clone()
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> DiskStats {
        self.0.state.lock().stats
    }

    /// The process has ended, and the machine lives: what was written is there.
    pub fn process_ended(&self) {
        let mut state = self.0.state.lock();
        state.life += 1;
        (state.power_for, state.fail_sync) = (None, false);
    }

    /// The power has gone, and comes back: of what was not synced any part may be there.
    pub fn power_lost(&self) {
        let mut state = self.0.state.lock();
        let state = &mut *state;
        state.life += 1;
        state.power = true;
        (state.power_for, state.fail_sync) = (None, false);
        let mut lost = 0;
        // Removals take effect in their order; the last ones may not have.
        let undone = state.rng.random_range(0..=state.removed.len());
        for (name, file) in state.removed.split_off(undone) {
            state.names.entry(name).or_insert(file);
        }
        state.forget_removed();
        for file in state.files.values_mut() {
            lost += file.lose(&mut state.rng);
        }
        state.stats.lost_sectors += lost;
        self.0.trace.note(&[30, lost], || format!("{}: power lost, {lost} sectors gone", self.0.path.display()));
    }

    /// The power goes after this many more writes and syncs, of the rows only or of anything.
    pub fn lose_power_after(&self, operations: u64, only_rows: bool) {
        self.0.state.lock().power_for = Some((operations, only_rows));
    }

    /// Whether the power has gone by itself.
    #[must_use]
    pub fn is_dark(&self) -> bool {
        !self.0.state.lock().power
    }

    /// Lets the next sync fail.
    pub fn fail_next_sync(&self) {
        self.0.state.lock().fail_sync = true;
    }

    /// During what the power went by itself, if it did since this was last asked.
    #[must_use]
    pub fn take_dark_at(&self) -> Option<&'static str> {
        self.0.state.lock().dark_at.take()
    }

    /// Lets the next read of the log bring a wrong bit.
    pub fn rot_next_read(&self) {
        self.0.state.lock().rot_next_read = true;
    }

    /// Turns a bit of the log for good. `false` if there is nothing that could rot.
    pub fn rot(&self) -> bool {
        let mut state = self.0.state.lock();
        let state = &mut *state;
        let logs = state.names.iter().filter(|(name, _)| name.starts_with(LOG) && name.ends_with(SEGMENT));
        let logs: Vec<u64> = logs.map(|(_, file)| *file).collect();
        if logs.is_empty() {
            return false;
        }
        let id = logs[state.rng.random_range(0..logs.len())];
        let is_last = state.last_log == Some(id);
        let Some(file) = state.files.get_mut(&id) else { return false };
        let Some(at) = place_to_rot(&file.bytes, file.may_rot(is_last), &mut state.rng) else { return false };
        file.rot(at, state.rng.random_range(0..8));
        state.stats.rotten += 1;
        self.0.trace.note(&[33, id, at as u64], || format!("{}: byte {at} of file {id} rots", self.0.path.display()));
        true
    }

    /// Changes how much fits.
    pub fn set_capacity(&self, bytes: u64) {
        self.0.state.lock().capacity = bytes;
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0.state.lock().used()
    }

    /// An empty disk in the place of this one.
    pub fn wipe(&self) {
        let mut state = self.0.state.lock();
        state.life += 1;
        (state.power, state.power_for, state.fail_sync) = (true, None, false);
        (state.rot_next_read, state.last_log, state.stats.rotten) = (false, None, 0);
        state.identity = None;
        state.files.clear();
        state.names.clear();
        state.removed.clear();
    }
}

impl State {
    fn used(&self) -> u64 {
        self.files.values().map(|file| file.bytes.len() as u64).sum()
    }

    /// What was removed is gone for good.
    fn forget_removed(&mut self) {
        self.removed.clear();
        let names = &self.names;
        self.files.retain(|file, _| names.values().any(|named| named == file));
    }

    /// Whether there is a process of this life, and power for one more operation.
    fn begin(&mut self, life: u64, what: &'static str) -> io::Result<()> {
        if life != self.life || !self.power {
            return Err(io::Error::other("the power is off"));
        }
        if let Some((left, only_rows)) = &mut self.power_for
            && (!*only_rows || what.starts_with("rows"))
        {
            if *left == 0 {
                (self.power, self.dark_at) = (false, Some(what));
                return Err(io::Error::other("the power went"));
            }
            *left -= 1;
        }
        Ok(())
    }

    fn check(&self, life: u64) -> io::Result<()> {
        if life != self.life || !self.power {
            return Err(io::Error::other("the power is off"));
        }
        Ok(())
    }

    fn room(&mut self, more: u64) -> io::Result<()> {
        if self.used() + more > self.capacity {
            self.stats.full += 1;
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"));
        }
        Ok(())
    }
}

impl Ground for SimDisk {
    fn path(&self) -> &Path {
        &self.0.path
    }

    fn lock(&self) -> Result<Box<dyn Any + Send + Sync>, StartError> {
        Ok(Box::new(()))
    }

    fn identity(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.state.lock().identity.clone())
    }

    fn set_identity(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.state.lock();
        let life = state.life;
        state.begin(life, "identity")?;
        state.identity = Some(bytes.to_vec());
        Ok(())
    }

    fn log(&self) -> io::Result<Arc<dyn Disk>> {
        let life = self.0.state.lock().life;
        Ok(Arc::new(Folder { disk: self.clone(), prefix: LOG, life }))
    }

    fn rows(&self) -> Arc<dyn Disk> {
        let life = self.0.state.lock().life;
        Arc::new(Folder { disk: self.clone(), prefix: "", life })
    }

    fn sync_names(&self) -> io::Result<()> {
        self.0.state.lock().forget_removed();
        Ok(())
    }

    fn free_bytes(&self) -> u64 {
        let state = self.0.state.lock();
        state.capacity.saturating_sub(state.used())
    }
}

/// A place with something in it, from anywhere in a range onwards.
fn place_to_rot(bytes: &[u8], range: Range<usize>, rng: &mut SmallRng) -> Option<usize> {
    let range = range.start..range.end.min(bytes.len());
    if range.is_empty() {
        return None;
    }
    let from = rng.random_range(range.clone());
    (from..range.end).chain(range.start..from).find(|at| bytes[*at] != 0)
}

/// A folder of a disk, as one process has it.
struct Folder {
    disk: SimDisk,
    prefix: &'static str,
    life: u64,
}

impl Folder {
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn handle(&self, file: u64) -> Arc<dyn DiskFile> {
        Arc::new(Handle { disk: self.disk.clone(), file, life: self.life, is_log: self.is_log() })
    }

    fn is_log(&self) -> bool {
        self.prefix == LOG
    }

    /// What is done, for whoever counts during what the power goes.
    fn what(&self, of_log: &'static str, of_rows: &'static str) -> &'static str {
        if self.is_log() { of_log } else { of_rows }
    }
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{name} is not there"))
}

impl Disk for Folder {
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let name = self.name(name);
        let mut state = self.disk.0.state.lock();
        state.begin(self.life, self.what("log: a new segment", "rows: a new file"))?;
        state.room(bytes)?;
        state.last_file += 1;
        let file = state.last_file;
        state.files.insert(file, File::zeroes(bytes as usize));
        state.names.insert(name, file);
        state.forget_removed();
        Ok(self.handle(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let name = self.name(name);
        let state = self.disk.0.state.lock();
        state.check(self.life)?;
        let file = *state.names.get(&name).ok_or_else(|| missing(&name))?;
        Ok(self.handle(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.name(from), self.name(to));
        let mut state = self.disk.0.state.lock();
        state.begin(self.life, self.what("log: a segment is renamed", "rows: the file is renamed"))?;
        state.stats.segments += u64::from(to.ends_with(SEGMENT));
        state.stats.released += u64::from(from.ends_with(SEGMENT));
        let file = state.names.remove(&from).ok_or_else(|| missing(&from))?;
        state.names.insert(to, file);
        state.forget_removed();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let name = self.name(name);
        let mut state = self.disk.0.state.lock();
        state.begin(self.life, self.what("log: a segment is removed", "rows: a file is removed"))?;
        state.stats.released += u64::from(name.ends_with(SEGMENT));
        let file = state.names.remove(&name).ok_or_else(|| missing(&name))?;
        state.removed.push((name, file));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.disk.0.state.lock();
        state.check(self.life)?;
        let ours = state.names.keys().filter_map(|name| name.strip_prefix(self.prefix));
        Ok(ours.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }
}

/// An open file, as one process has it.
struct Handle {
    disk: SimDisk,
    file: u64,
    life: u64,
    is_log: bool,
}

impl Handle {
    /// Works on the file. `begins` says for log and rows what is begun, if the power may go in it.
    fn with<T>(
        &self,
        begins: Option<[&'static str; 2]>,
        work: impl FnOnce(&mut State, &mut File) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.disk.0.state.lock();
        match begins {
            Some(what) => state.begin(self.life, what[usize::from(!self.is_log)])?,
            None => state.check(self.life)?,
        }
        let mut file = state.files.remove(&self.file).ok_or_else(|| missing("the file"))?;
        let done = work(&mut state, &mut file);
        state.files.insert(self.file, file);
        done
    }
}

impl DiskFile for Handle {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(Some(["log: a write", "rows: a write"]), |state, file| {
            let end = offset as usize + bytes.len();
            state.room(end.max(file.bytes.len()) as u64)?;
            file.write(bytes, offset);
            state.stats.writes += 1;
            let hash = xxhash_rust::xxh3::xxh3_64(bytes);
            self.disk.0.trace.note(&[31, self.file, offset, hash], || {
                format!(
                    "{}: {} bytes {hash:016x} at {offset} of file {}",
                    self.disk.0.path.display(),
                    bytes.len(),
                    self.file
                )
            });
            Ok(())
        })
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(None, |state, file| {
            let from = file.bytes.get(offset as usize..).and_then(|rest| rest.get(..bytes.len()));
            let from = from.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "beyond the end"))?;
            bytes.copy_from_slice(from);
            if self.is_log && state.rot_next_read {
                let is_start = bytes.len() == file.bytes.len();
                let range = match is_start {
                    true => file.may_rot(state.last_log == Some(self.file)),
                    false if bytes.len() <= RECORD_READ_BYTES_MAX => 0..bytes.len(),
                    false => 0..0,
                };
                if let Some(at) = place_to_rot(bytes, range, &mut state.rng) {
                    state.rot_next_read = false;
                    bytes[at] ^= 1 << state.rng.random_range(0..8_u32);
                    state.stats.rotten_starts += u64::from(is_start);
                    state.stats.rotten_reads += u64::from(!is_start);
                }
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(Some(["log: a sync", "rows: a sync"]), |state, file| {
            state.stats.syncs += 1;
            if std::mem::replace(&mut state.fail_sync, false) {
                state.stats.failed_syncs += 1;
                // What the system makes of the pages after that is anybody's guess.
                file.lose(&mut state.rng);
                return Err(io::Error::other("the disk failed to sync"));
            }
            if file.sync() && self.is_log {
                state.last_log = Some(self.file);
            }
            self.disk
                .0
                .trace
                .note(&[32, self.file], || format!("{}: file {} synced", self.disk.0.path.display(), self.file));
            Ok(())
        })
    }

    fn bytes(&self) -> io::Result<u64> {
        self.with(None, |_, file| Ok(file.bytes.len() as u64))
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.with(Some(["log: a change of length", "rows: a change of length"]), |state, file| {
            state.room(bytes)?;
            file.resize(bytes);
            Ok(())
        })
    }
}
