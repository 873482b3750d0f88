//! A file system in memory that can be told to fail or to die at any operation,
//! and that knows which of its bytes would survive a loss of power. Tests only.

use super::fs::{Entry, Fs};
use crate::errno::{Errno, Io};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

#[derive(Debug, Clone)]
enum Node {
    File { now: Vec<u8>, durable: Vec<u8> },
    Dir { now: Names, durable: Names },
}

type Names = BTreeMap<Vec<u8>, usize>;

/// What happens at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The process dies: a write is half done, nothing after it happens.
    Kill,
    /// The operation fails, a write after half its bytes.
    Fail(Errno),
    /// A write takes half its bytes; other operations succeed.
    Short,
}

/// What is left after a crash.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Crash {
    /// The process died: all it did is there.
    Process,
    /// Power was lost: only what was synced is there.
    Power,
    /// Power was lost, and names reached the disk before contents did.
    PowerNamesFirst,
}

pub const CRASHES: [Crash; 3] = [Crash::Process, Crash::Power, Crash::PowerNamesFirst];

#[derive(Debug, Clone)]
struct State {
    nodes: Vec<Node>,
    operations: usize,
    fault: Option<(usize, Fault)>,
    dead: bool,
}

#[derive(Debug, Clone)]
pub struct FaultFs(RefCell<State>);

impl FaultFs {
    pub fn new() -> FaultFs {
        let root = Node::Dir {
            now: Names::new(),
            durable: Names::new(),
        };
        FaultFs(RefCell::new(State {
            nodes: vec![root],
            operations: 0,
            fault: None,
            dead: false,
        }))
    }

    /// The fault strikes at the `at`-th modifying operation from now on (1 = next).
    pub fn arm(&self, at: usize, fault: Fault) {
        let mut state = self.0.borrow_mut();
        state.operations = 0;
        state.fault = Some((at, fault));
    }

    /// No fault from now on, unless the process is dead already.
    pub fn disarm(&self) {
        self.0.borrow_mut().fault = None;
    }

    /// Modifying operations since `arm`.
    pub fn operations(&self) -> usize {
        self.0.borrow().operations
    }

    /// What the next life finds.
    pub fn after(&self, crash: Crash) -> FaultFs {
        let mut state = self.0.borrow().clone();
        state.dead = false;
        state.fault = None;
        for node in &mut state.nodes {
            match node {
                Node::File { now, durable } if crash != Crash::Process => {
                    now.clone_from(durable);
                }
                Node::Dir { now, durable } if crash == Crash::Power => now.clone_from(durable),
                _ => {}
            }
        }
        FaultFs(RefCell::new(state))
    }
}

impl State {
    /// Counts an operation and strikes; `Ok(true)`: only half a write is done.
    fn step(&mut self) -> Io<bool> {
        if self.dead {
            return Err(Errno::EIO);
        }
        self.operations += 1;
        match self.fault {
            Some((at, fault)) if at == self.operations => match fault {
                Fault::Kill => {
                    self.dead = true;
                    Err(Errno::EIO)
                }
                Fault::Fail(errno) => Err(errno),
                Fault::Short => Ok(true),
            },
            _ => Ok(false),
        }
    }

    fn node(&self, path: &Path) -> Io<usize> {
        let mut at = 0;
        for part in path.components() {
            let std::path::Component::Normal(name) = part else {
                continue;
            };
            at = match &self.nodes[at] {
                Node::Dir { now, .. } => *now.get(name.as_bytes()).ok_or(Errno::ENOENT)?,
                Node::File { .. } => return Err(Errno::ENOTDIR),
            };
        }
        Ok(at)
    }

    fn names(&mut self, path: &Path) -> Io<&mut Names> {
        let at = self.node(path)?;
        match &mut self.nodes[at] {
            Node::Dir { now, .. } => Ok(now),
            Node::File { .. } => Err(Errno::ENOTDIR),
        }
    }

    fn data(&mut self, at: usize) -> (&mut Vec<u8>, &mut Vec<u8>) {
        match &mut self.nodes[at] {
            Node::File { now, durable } => (now, durable),
            Node::Dir { .. } => panic!("a directory is read or written"),
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> Io<usize> {
        let (parent, name) = split(path);
        let new = self.nodes.len();
        let names = self.names(parent)?;
        if names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        names.insert(name.to_vec(), new);
        self.nodes.push(node);
        Ok(new)
    }

    fn is_filled_dir(&self, at: usize) -> bool {
        matches!(&self.nodes[at], Node::Dir { now, .. } if !now.is_empty())
    }
}

fn split(path: &Path) -> (&Path, &[u8]) {
    let name = path.file_name().unwrap_or(OsStr::new("")).as_bytes();
    (path.parent().unwrap_or(Path::new("/")), name)
}

impl Fs for FaultFs {
    type File = usize;

    fn mkdir(&self, path: &Path) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let dir = Node::Dir {
            now: Names::new(),
            durable: Names::new(),
        };
        state.add(path, dir).map(drop)
    }

    fn create_new(&self, path: &Path) -> Io<usize> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let file = Node::File {
            now: Vec::new(),
            durable: Vec::new(),
        };
        state.add(path, file)
    }

    fn open(&self, path: &Path) -> Io<usize> {
        let state = self.0.borrow();
        if state.dead {
            return Err(Errno::EIO);
        }
        state.node(path)
    }

    fn open_or_create(&self, path: &Path) -> Io<(usize, bool)> {
        match self.open(path) {
            Ok(file) => Ok((file, false)),
            Err(_) => Ok((self.create_new(path)?, true)),
        }
    }

    fn len(&self, file: &usize) -> Io<u64> {
        Ok(self.0.borrow_mut().data(*file).0.len() as u64)
    }

    fn read_at(&self, file: &usize, buffer: &mut [u8], offset: u64) -> Io<usize> {
        let mut state = self.0.borrow_mut();
        let mut data: &[u8] = state.data(*file).0;
        data = data.get(offset as usize..).unwrap_or(&[]);
        let now = data.len().min(buffer.len());
        buffer[..now].copy_from_slice(&data[..now]);
        Ok(now)
    }

    fn write_at(&self, file: &usize, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
        let mut state = self.0.borrow_mut();
        let was_dead = state.dead;
        let step = state.step();
        let mut bytes: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
        if step != Ok(false) && !was_dead {
            bytes.truncate(bytes.len() / 2);
        }
        if !was_dead {
            let (now, _) = state.data(*file);
            let end = offset as usize + bytes.len();
            if now.len() < end {
                now.resize(end, 0);
            }
            now[offset as usize..end].copy_from_slice(&bytes);
        }
        step.map(|_| bytes.len())
    }

    fn truncate(&self, file: &usize, len: u64) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        state.data(*file).0.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self, file: &usize) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let (now, durable) = state.data(*file);
        durable.clone_from(now);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let at = state.node(path)?;
        if let Node::Dir { now, durable } = &mut state.nodes[at] {
            durable.clone_from(now);
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let node = state.node(from)?;
        if let Ok(there) = state.node(to)
            && state.is_filled_dir(there)
        {
            return Err(Errno::ENOTEMPTY);
        }
        let (parent, name) = split(from);
        state.names(parent)?.remove(name);
        let (parent, name) = split(to);
        state.names(parent)?.insert(name.to_vec(), node);
        Ok(())
    }

    fn unlink(&self, path: &Path) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        state.node(path)?;
        let (parent, name) = split(path);
        state.names(parent)?.remove(name);
        Ok(())
    }

    fn rmdir(&self, path: &Path) -> Io<()> {
        let mut state = self.0.borrow_mut();
        state.step()?;
        let node = state.node(path)?;
        if state.is_filled_dir(node) {
            return Err(Errno::ENOTEMPTY);
        }
        let (parent, name) = split(path);
        state.names(parent)?.remove(name);
        Ok(())
    }

    fn list(&self, path: &Path) -> Io<Vec<Entry>> {
        let mut state = self.0.borrow_mut();
        if state.dead {
            return Err(Errno::EIO);
        }
        let names = state.names(path)?.clone();
        let entry = |(name, node): (Vec<u8>, usize)| Entry {
            name,
            dir: matches!(state.nodes[node], Node::Dir { .. }),
        };
        Ok(names.into_iter().map(entry).collect())
    }
}
