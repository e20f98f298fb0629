//! Small file systems of a test's own, which can be filled up and made slow without harm to others.
//!
//! Only root may mount. Where a loop device can be had it is ext4 over a sparse file, so that a sync is a real one, and it is
//! slowed down by the kernel's own limit on writes to that device (`blkio.throttle.write_iops_device` of the root group,
//! cgroup version 1). Elsewhere it is a file system in memory, which can be filled but not slowed.

#![expect(clippy::expect_used, reason = "tests fail where they cannot go on")]

use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Room for the rows of one node several times over.
const DISK_BYTES: u64 = 256 << 20;
const BALLAST: &str = "ballast";
const LIMITS: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_iops_device";

/// A mounted file system; it is unmounted when this is dropped.
pub struct SmallDisk {
    folder: PathBuf,
    /// The number of the device whose writes can be limited.
    device: Option<String>,
}

fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).output().is_ok_and(|done| done.status.success())
}

fn mount_ext4(folder: &Path) -> bool {
    let image = folder.with_extension("image");
    File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("the folder can be written");
    let is_mounted = succeeds(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))
        && succeeds(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(folder));
    std::fs::remove_file(&image).expect("it was made here"); // the loop device holds on to what it needs
    is_mounted
}

fn mount_memory(folder: &Path) -> bool {
    let size = format!("size={DISK_BYTES}");
    succeeds(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder))
}

/// No more than so many writes a second to a device; 0 is no limit.
fn limit(device: &str, writes_a_second: u64) -> bool {
    std::fs::write(LIMITS, format!("{device} {writes_a_second}\n")).is_ok()
}

impl SmallDisk {
    /// Makes the folder, and mounts a file system there if this process may.
    #[must_use]
    pub fn mount(folder: &Path) -> Option<Self> {
        std::fs::create_dir(folder).expect("the folder above it can be written");
        if mount_ext4(folder) {
            let number = std::fs::metadata(folder).expect("it is mounted").dev();
            let device = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
            // A test that was killed may have left its limit on the device.
            let device = limit(&device, 0).then_some(device);
            return Some(Self { folder: folder.to_owned(), device });
        }
        mount_memory(folder).then(|| Self { folder: folder.to_owned(), device: None })
    }

    /// Takes all room there is, but for about `spare` bytes.
    pub fn fill(&self, spare: u64) {
        let ballast = File::create(self.folder.join(BALLAST)).expect("a name needs no room");
        let mut length = 0;
        for piece in [16 << 20, 1 << 20, 64 << 10] {
            while fallocate(&ballast, FallocateFlags::empty(), length, piece).is_ok() {
                length += piece;
            }
        }
        ballast.set_len(length.saturating_sub(spare)).expect("room can be given back");
    }

    /// Gives the room back.
    pub fn empty(&self) {
        std::fs::remove_file(self.folder.join(BALLAST)).expect("it was filled");
    }

    /// Whether it can be made slow.
    #[must_use]
    pub fn can_be_slow(&self) -> bool {
        self.device.is_some()
    }

    /// Lets no more than so many writes a second through; 0 is no limit.
    pub fn slow(&self, writes_a_second: u64) {
        let device = self.device.as_deref().expect("it can be made slow");
        assert!(limit(device, writes_a_second), "the limit on {device} cannot be set");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            limit(device, 0);
        }
        succeeds(Command::new("umount").arg("--lazy").arg(&self.folder)); // the folder is removed behind it
    }
}
