//! Files that the image has open or maps, and that no table tells of: nothing was done to them
//! since the generation, but somebody else may have moved or replaced them.
//! (Those that tables tell of: `persist::undo::lost`.) Constructor, after the undo.

use super::files::{FilesBack, leaves_alone_at_restore};
use crate::agent::collect::descriptors::sys;
use crate::config::{Config, Foreign};
use crate::image::state::{FileKind, Manifest, VmaKind};
use crate::persist::{exclude, undo};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What must be found again.
#[derive(Debug, Default)]
pub struct Needs {
    /// Where it was.
    pub paths: Vec<Vec<u8>>,
    open: Vec<Open>,
}

/// A regular file that is open.
#[derive(Debug, Clone)]
struct Open {
    path: Vec<u8>,
    dev: u64,
    ino: u64,
    btime_ns: i64,
}

/// What was found out about them.
#[derive(Debug, Default)]
pub struct Strays {
    /// Paths at the generation and now, of files that stay where they are now.
    pub followed: Vec<(Vec<u8>, Vec<u8>)>,
    /// For the log.
    pub lines: Vec<String>,
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

impl Needs {
    pub fn of(manifest: &Manifest, config: &Config) -> Needs {
        let mut needs = Needs::default();
        let table = &manifest.descriptors;
        for (k, file) in table.files.iter().enumerate() {
            let mut numbers = table.fds.iter().filter(|d| d.file as usize == k);
            // The new start provides these.
            if numbers.any(|d| d.inherited) {
                continue;
            }
            let FileKind::Regular {
                path,
                dev,
                ino,
                btime_ns,
                mode,
                ..
            } = &file.kind
            else {
                continue;
            };
            let led_elsewhere = config.redirect.iter().any(|(old, _)| old == path);
            if mode & libc::S_IFMT == libc::S_IFREG
                && !led_elsewhere
                && !path.starts_with(b"/proc/")
                && !path.starts_with(b"/sys/")
            {
                needs.open.push(Open {
                    path: path.clone(),
                    dev: *dev,
                    ino: *ino,
                    btime_ns: *btime_ns,
                });
                needs.paths.push(path.clone());
            }
        }
        for vma in &manifest.memory.vmas {
            if let VmaKind::FileShared { path, .. } = &vma.kind {
                needs.paths.push(path.clone());
            }
        }
        needs
    }

    /// Looks for each open file that is not where it was. What somebody else has moved within
    /// its directory goes back, or is followed there (`CKPT_FOREIGN=keep`).
    pub fn find_strays(
        &self,
        job_dir: &Path,
        config: &Config,
        back: &FilesBack,
    ) -> Result<Strays, String> {
        let mut strays = Strays::default();
        for open in &self.open {
            let known = |entry: &(Vec<u8>, Vec<u8>)| entry.0 == open.path;
            if back.moved.iter().any(known) || strays.followed.iter().any(known) {
                continue;
            }
            let there = sys::identity(libc::AT_FDCWD, &sys::cstr(&open.path), 0);
            if matches!(there, Ok((dev, ino, born)) if open.is(dev, ino, born, back)) {
                continue;
            }
            open.find(config, (job_dir, back), there.is_ok(), &mut strays)?;
        }
        Ok(strays)
    }
}

impl Open {
    fn is(&self, dev: u64, ino: u64, btime_ns: i64, back: &FilesBack) -> bool {
        let made_anew = back.replaced.contains(&((self.dev, self.ino), (dev, ino)));
        let same_age = btime_ns == self.btime_ns || btime_ns == 0 || self.btime_ns == 0;
        made_anew || (dev, ino) == (self.dev, self.ino) && same_age
    }

    fn find(
        &self,
        config: &Config,
        (job_dir, back): (&Path, &FilesBack),
        replaced: bool,
        strays: &mut Strays,
    ) -> Result<(), String> {
        let path = as_path(&self.path).display();
        let keep = config.foreign == Foreign::Keep || leaves_alone_at_restore(config, &self.path);
        // What the program left alone it may have moved itself.
        let keep = keep || self.is_excluded(config);
        let Some(at) = self.beside(back) else {
            if replaced && keep {
                strays.lines.push(format!(
                    "{path} was replaced by somebody else: the program goes on with what is there now"
                ));
                let entry = (self.path.clone(), self.path.clone());
                strays.followed.push(entry);
            }
            // What cannot be opened is told when it is to be opened.
            return Ok(());
        };
        let moved = format!("{path} was moved by somebody else");
        if config.foreign == Foreign::Refuse {
            return Err(format!(
                "{moved}; CKPT_FOREIGN=keep leaves such files as they are"
            ));
        }
        let at_text = at.display();
        if keep {
            let line = format!("{moved}: it stays where it is, {at_text}");
            strays.lines.push(line);
            let at = at.as_os_str().as_bytes().to_vec();
            strays.followed.push((self.path.clone(), at));
            return Ok(());
        }
        let aside = undo::set_aside(job_dir, &self.path);
        let back = aside.map_err(|error| error.to_string()).and_then(|aside| {
            let done = std::fs::rename(&at, as_path(&self.path));
            done.map(|()| aside).map_err(|error| error.to_string())
        });
        let aside = back.map_err(|error| {
            format!("{moved}, and cannot be moved back from {at_text}: {error}")
        })?;
        let aside = aside.map(|aside| format!("; what was there instead is {}", aside.display()));
        strays.lines.push(format!(
            "{moved}: moved back from {at_text}{}",
            aside.unwrap_or_default()
        ));
        Ok(())
    }

    /// By the settings: the program's own rules are not known yet.
    fn is_excluded(&self, config: &Config) -> bool {
        let any = |globs: &[Vec<u8>]| globs.iter().any(|g| exclude::matches(g, &self.path));
        any(&config.exclude) && !any(&config.include)
    }

    /// Under another name in its directory.
    fn beside(&self, back: &FilesBack) -> Option<PathBuf> {
        if self.btime_ns == 0 {
            return None;
        }
        let dir = as_path(&self.path).parent()?;
        let mut entries = std::fs::read_dir(dir).ok()?.flatten();
        let found = entries.find(|entry| {
            let path = entry.path();
            let same = entry.metadata().is_ok_and(|meta| meta.dev() == self.dev && meta.is_file());
            let name = sys::cstr(path.as_os_str().as_bytes());
            let it = || sys::identity(libc::AT_FDCWD, &name, libc::AT_SYMLINK_NOFOLLOW);
            same && matches!(it(), Ok((dev, ino, born)) if born != 0 && self.is(dev, ino, born, back))
        });
        found.map(|entry| entry.path())
    }
}
