//! Undoing records about names: created, removed, moved.

use super::apply::{Current, Undoer, as_path, c, on};
use super::{Fate, ForeignFile, UndoError};
use crate::config::Foreign;
use crate::persist::sys::{self, CPath};
use crate::persist::table::{Kept, Moved, Name, Record, Xattrs};
use crate::persist::{Identity, Stat};

impl Undoer<'_, '_> {
    /// What is at a path itself; `None`: nothing.
    fn look(&self, path: &CPath) -> Result<Option<Stat>, UndoError> {
        match self.lstat(path) {
            Ok(stat) => Ok(Some(stat)),
            Err(libc::ENOENT) | Err(libc::ENOTDIR) => Ok(None),
            Err(e) => on(Err(e), "look at", path.bytes()),
        }
    }

    pub fn name_record(
        &mut self,
        current: &Current,
        k: usize,
        record: &Record,
    ) -> Result<(), UndoError> {
        // The last record's operation may have been cut short between making an inode
        // and telling of it.
        let last = k + 1 == current.table.records.len();
        match record {
            Record::Absent { name } => {
                let path = name.path();
                if self.is_excluded(&path) {
                    return Ok(());
                }
                self.clear(&path, last).map(drop)
            }
            Record::Gone {
                name,
                stat,
                kept,
                xattrs,
            } => self.gone(current, k, name, stat, kept, xattrs),
            Record::RemovedDir { name, stat, xattrs } => {
                self.removed_dir(current, k, name, stat, xattrs)
            }
            Record::Renamed {
                from,
                to,
                moved,
                other,
            } => self.renamed(current, from, to, moved, other.as_ref(), last),
            _ => Ok(()),
        }
    }

    /// Removes whatever is at the path. False: it was left (`CKPT_FOREIGN=keep`).
    fn clear(&mut self, path: &[u8], sure: bool) -> Result<bool, UndoError> {
        match self.look(&c(path)?)? {
            Some(present) => self.remove(path, &present, sure),
            None => Ok(true),
        }
    }

    /// What the inode that lost a name at record `k` is now, so that one knows whether it is
    /// there already. Its number may have been given to another inode since.
    fn now(&self, current: &Current, k: usize, stat: &Stat, kept: Option<&Kept>) -> Identity {
        if let Some(Kept::Link(_)) = kept {
            // Not while there is a link to it.
            return stat.identity();
        }
        if stat.birth != 0 {
            return self.replaced.resolve(&stat.identity());
        }
        let reborn = current.born.get(&stat.id).is_some_and(|at| *at > k);
        if !reborn && !stat.is_dir() && stat.nlink > 1 {
            return self.replaced.resolve(&stat.identity());
        }
        // It had gone for good, unless the last operation (two records for a renaming)
        // was cut short.
        let last = !reborn && k + 2 >= current.table.records.len();
        let made = self.replaced.remade(&stat.id);
        made.unwrap_or(if last {
            stat.identity()
        } else {
            Identity::default()
        })
    }

    /// Is the inode that lost a name at record `k` what is there? A kind never changes.
    fn is_there(
        &self,
        current: &Current,
        k: usize,
        stat: &Stat,
        kept: Option<&Kept>,
        present: &Stat,
    ) -> bool {
        let (now, there) = (self.now(current, k, stat, kept), present.identity());
        // By its number alone: one that the undo of a newer table has made may have that.
        let by_number = stat.birth == 0
            && !matches!(kept, Some(Kept::Link(_)))
            && now == stat.identity()
            && !self.replaced.is(&there, &stat.identity());
        (present.mode ^ stat.mode) & libc::S_IFMT == 0 && now.is(&there) && !by_number
    }

    fn gone(
        &mut self,
        current: &Current,
        k: usize,
        name: &Name,
        stat: &Stat,
        kept: &Kept,
        xattrs: &Xattrs,
    ) -> Result<(), UndoError> {
        let path = name.path();
        if self.is_excluded(&path) || self.findings.keep.contains(&stat.id) {
            return Ok(());
        }
        if self.is_left_out(&stat.identity()) {
            return self.clear(&path, false).map(drop);
        }
        let at = c(&path)?;
        if let Some(present) = self.look(&at)?
            && (self.is_there(current, k, stat, Some(kept), &present)
                || !self.remove(&path, &present, false)?)
        {
            return Ok(());
        }
        self.make_directory(&name.dir_path, stat)?;
        if let Kept::Link(link) = kept {
            let link = self.kept_path(current, link);
            self.step("put back", &as_path(&path))?;
            self.tell_back(&link)?;
            self.tell_name(&path, |session, name| session.before_create(name))?;
            on(sys::link(&c(&link)?, &at), "put back", &path)?;
            return self.tell_back(&path);
        }
        // The inode may live on under another name, if it had one.
        let born_again = stat.birth == 0 && current.born.get(&stat.id).is_some_and(|at| *at > k);
        let info = current.rows.of_inode(&stat.identity());
        let info = info.filter(|_| !born_again && stat.nlink > 1);
        if let Some(alive) = info.and_then(|info| self.find_former(info)) {
            self.step("put back", &as_path(&path))?;
            self.tell_link(&alive, &path)?;
            on(sys::link(&c(&alive)?, &at), "put back", &path)?;
            return self.tell_back(&path);
        }
        // Another name of the same inode may be back already.
        let now = self.now(current, k, stat, Some(kept));
        if now != stat.identity() {
            let twins = current.gone_names.get(&stat.identity());
            for twin in twins.into_iter().flatten() {
                let twin = c(twin)?;
                if self
                    .look(&twin)?
                    .is_some_and(|there| there.identity().is(&now))
                {
                    self.step("put back", &as_path(&path))?;
                    self.tell_link(twin.bytes(), &path)?;
                    return on(sys::link(&twin, &at), "put back", &path);
                }
            }
        }
        let source = match kept {
            Kept::Copy(copy) => Some(self.kept_path(current, copy)),
            _ => None,
        };
        let target = match kept {
            Kept::Symlink(target) => Some(target.as_slice()),
            _ => None,
        };
        self.make_anew(
            (current.table.file.seq, k),
            name,
            stat,
            source.as_deref(),
            target,
            xattrs,
        )
    }

    fn removed_dir(
        &mut self,
        current: &Current,
        k: usize,
        name: &Name,
        stat: &Stat,
        xattrs: &Xattrs,
    ) -> Result<(), UndoError> {
        let path = name.path();
        if self.is_excluded(&path) {
            return Ok(());
        }
        if let Some(present) = self.look(&c(&path)?)?
            && (self.is_there(current, k, stat, None, &present)
                || !self.remove(&path, &present, false)?)
        {
            return Ok(());
        }
        self.make_directory(&name.dir_path, stat)?;
        self.make_anew((current.table.file.seq, k), name, stat, None, None, xattrs)?;
        // What was in it comes back, where it was not empty at the checkpoint.
        match current.rows.of_inode(&stat.identity()) {
            Some(_) => self.lift(&path),
            None => Ok(()),
        }
    }

    #[allow(clippy::too_many_arguments)] // what a record says, as it says it
    fn renamed(
        &mut self,
        current: &Current,
        from: &Name,
        to: &Name,
        moved: &Moved,
        other: Option<&Moved>,
        last: bool,
    ) -> Result<(), UndoError> {
        let made = |moved: &Moved| {
            let number = || current.born.contains_key(&moved.inode.id);
            moved.born.unwrap_or_else(number)
        };
        // An exchange of what was made in this table with what existed: the one that existed
        // decides. The other may be gone without a record, and its number another inode's.
        let (from, to, moved, other) = match other {
            Some(existed) if made(moved) && !made(existed) => (to, from, existed, Some(moved)),
            _ => (from, to, moved, other),
        };
        let (from_path, to_path) = (from.path(), to.path());
        // What has left or entered the files that are left alone goes back.
        if self.is_excluded_by_option(&from_path)
            || self.is_excluded_by_option(&to_path)
            || self.is_excluded(&from_path) && self.is_excluded(&to_path)
        {
            return Ok(());
        }
        self.lift_parent(&from_path)?;
        self.lift_parent(&to_path)?;
        let (a, b) = (c(&from_path)?, c(&to_path)?);
        let (at_from, at_to) = (self.look(&a)?, self.look(&b)?);
        let is = |there: &Option<Stat>, moved: &Moved, r: &super::state::Replaced| {
            let inode = &moved.inode;
            there.as_ref().is_some_and(|s| r.is(&s.identity(), inode))
        };
        if is(&at_from, moved, &self.replaced) {
            // Not moved, or moved back already.
            return self.shift_places(&to_path, &from_path);
        }
        let (mut id_at_to, mut other_at_from) = (
            is(&at_to, moved, &self.replaced),
            other.is_some_and(|other| is(&at_from, other, &self.replaced)),
        );
        // Half of an exchange, the other half moved on by somebody else: it comes back first, so
        // that an undo that is killed in between finds an exchange.
        if let Some(other) = other
            && id_at_to != other_at_from
        {
            let (half, back, present) = match id_at_to {
                true => (other, &from_path, at_from),
                false => (moved, &to_path, at_to),
            };
            if !made(half)
                && !self.findings.keep.contains(&half.inode.id)
                && !self.is_placed(&half.inode)
                && let Some(at) = self.moved_on(half, back)
            {
                self.move_back(&at, back, present, last)?;
                let there = self.look(&c(back)?)?;
                let is_back = is(&there, half, &self.replaced);
                (id_at_to, other_at_from) = (id_at_to || is_back, other_at_from || is_back);
            }
        }
        if id_at_to && other_at_from {
            self.step("move back", &as_path(&from_path))?;
            self.tell_move(&to_path, &from_path, true)?;
            let done = sys::rename(&b, &a, libc::RENAME_EXCHANGE);
            on(done, "move back", &from_path)?;
            return self.shift_places(&to_path, &from_path);
        }
        if id_at_to {
            return self.move_back(&to_path, &from_path, at_from, last);
        }
        if other_at_from {
            // Half of an exchange: what was made since is gone since.
            return self.move_back(&from_path, &to_path, at_to, last);
        }
        if other.is_some_and(|other| is(&at_to, other, &self.replaced))
            || made(moved) && other.is_none_or(made)
        {
            return Ok(());
        }
        if self.findings.keep.contains(&moved.inode.id) {
            return Ok(());
        }
        let (moved, back) = match other {
            Some(other) if made(moved) => (other, &to_path),
            _ => (moved, &from_path),
        };
        if self.findings.keep.contains(&moved.inode.id) {
            return Ok(());
        }
        if self.is_placed(&moved.inode) {
            // What was made under its former name since has no record of its own.
            return self.clear(back, last).map(drop);
        }
        if let Some(at) = self.moved_on(moved, &to_path) {
            let present = self.look(&c(back)?)?;
            return self.move_back(&at, back, present, last);
        }
        if let Some(link) = self.find_kept(&moved.inode) {
            self.clear(back, last)?;
            self.step("put back", &as_path(back))?;
            self.tell_back(&link)?;
            self.tell_name(back, |session, name| session.before_create(name))?;
            on(sys::link(&c(&link)?, &c(back)?), "put back", back)?;
            return self.tell_back(back);
        }
        self.lost::<()>(&to_path, moved.inode.id).map(drop)
    }

    /// Where somebody else has moved an inode on that no row is about.
    fn moved_on(&mut self, moved: &Moved, to: &[u8]) -> Option<Vec<u8>> {
        if self.options.foreign == Foreign::Keep {
            return None;
        }
        let now = self.replaced.resolve(&moved.inode);
        let at = self.look_beside(to, &now)?;
        self.findings.add(ForeignFile {
            path: as_path(to),
            aside: None,
            what: "moved",
            fate: Fate::Back(as_path(&at)),
        });
        Some(at)
    }

    fn move_back(
        &mut self,
        from: &[u8],
        to: &[u8],
        present: Option<Stat>,
        last: bool,
    ) -> Result<(), UndoError> {
        if let Some(present) = present
            && !self.remove(to, &present, last)?
        {
            return Ok(());
        }
        self.step("move back", &as_path(to))?;
        self.tell_move(from, to, false)?;
        on(sys::rename(&c(from)?, &c(to)?, 0), "move back", to)?;
        self.shift_places(from, to)
    }
}
