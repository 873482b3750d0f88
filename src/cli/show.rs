//! `ckpt show`: what is in a checkpoint.

use super::output::{self, Table};
use super::{Cli, Outcome, select};
use crate::config::Resume;
use crate::image::PAGE;
use crate::image::state::{FileKind, Manifest, OpenFileState, SocketRole, VmaKind, VmaState};
use crate::persist::diff;
use crate::store::{Found, Job, RawFs};
use serde_json::{Value, json};
use std::process::ExitCode;

/// Show what is in a checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Key, name or beginning of one [default: the only job there is]
    job: Option<String>,
    /// Generation [default: the latest valid one]
    generation: Option<u64>,
    /// Only the memory map
    #[arg(long)]
    maps: bool,
    /// Only the threads
    #[arg(long)]
    threads: bool,
    /// Only the descriptors
    #[arg(long)]
    descriptors: bool,
    /// Only the files: the program, its libraries, open and mapped files, and what was
    /// modified since
    #[arg(long)]
    files: bool,
}

impl Args {
    fn wants(&self, part: bool) -> bool {
        part || !(self.maps || self.threads || self.descriptors || self.files)
    }
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let job = select::job(&root, args.job.as_deref())?;
    let resume = args.generation.map_or(Resume::Auto, Resume::Generation);
    let (found, skipped) = job.find(resume, false)?;
    for skipped in skipped {
        tracing::warn!("{skipped}");
    }
    let Some(found) = found else {
        anyhow::bail!("job {} has no checkpoint", job.name());
    };
    if cli.json {
        let mut value = output::generation_json(&job, &found.record);
        value["job"] = json!(job.name());
        value["dir"] = json!(
            job.generation_dir(found.record.generation)
                .to_string_lossy()
        );
        let details = found
            .members
            .iter()
            .map(|m| member_json(args, &m.image.manifest));
        if args.wants(args.files) {
            value["modified"] = modified_json(&job, &found)?;
        }
        value["contents"] = Value::Array(details.collect());
        output::print_json(&value);
        return Ok(ExitCode::SUCCESS);
    }
    if args.wants(false) {
        summary(&job, &found);
    }
    for member in &found.members {
        let manifest = &member.image.manifest;
        let sections = [
            (args.maps, maps(manifest)),
            (args.threads, threads(manifest)),
            (args.descriptors, descriptors(manifest)),
            (args.files, files(manifest)),
        ];
        for (chosen, table) in sections {
            if args.wants(chosen) {
                if !chosen {
                    println!();
                }
                table.print();
            }
        }
    }
    if args.wants(args.files) {
        println!();
        modified(&job, &found)?.print();
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(job: &Job<RawFs>, found: &Found<RawFs>) {
    let record = &found.record;
    let mut table = Table::new(&["", ""]);
    let mut line = |name: &str, value: String| table.row(vec![name.to_owned(), value]);
    line("job", job.name());
    line("generation", record.generation.to_string());
    line("checkpoint id", record.id.to_string());
    if let Some(parent) = record.parent {
        line("parent", parent.to_string());
    }
    let (time, age) = (output::time(record.time_ns), output::age(record.time_ns));
    line("taken", format!("{time} ({age}) by {}", record.trigger));
    let kind = match (&record.merged, record.needs()) {
        (Some(merged), _) => format!("full (merged {})", output::age(merged.time_ns)),
        (None, Some(needed)) => format!("increment, stands on generation {needed}"),
        (None, None) => record.kind.name().to_owned(),
    };
    line("kind", kind);
    if job.journal.left().contains(&record.generation) {
        line("undo", "the state that was left by going back".to_owned());
    }
    line("memory", output::size(record.bytes_logical));
    line("stored", output::size(record.stored_now()));
    line("dirty pages", record.pages_dirty.to_string());
    line("stop", output::micros(record.stop_us));
    let p = &record.phases;
    let split = [
        ("park", p.park_us),
        ("collect", p.collect_us),
        ("scan", p.scan_us),
        (&record.snapshot, p.copy_us),
        ("release", p.release_us),
    ];
    let split: Vec<String> = split
        .iter()
        .map(|(name, us)| format!("{name} {}", output::micros(*us)))
        .collect();
    line("of it", split.join(", "));
    line(
        "before it",
        format!(
            "{} pages stored in {}",
            p.precopied_pages,
            output::micros(p.precopy_us)
        ),
    );
    line("until durable", output::micros(record.persist_us));
    line(
        "tracker, snapshot",
        format!("{}, {}", record.tracker, record.snapshot),
    );
    line(
        "files",
        match output::files_incomplete(job, record) {
            Some(reason) => format!("incomplete: {reason}"),
            None => "can go back".to_owned(),
        },
    );
    for stream in &record.files.streams {
        let (path, size) = (output::text(&stream.path), output::size(stream.size));
        line("output", format!("{path} ({size})"));
    }
    for member in &found.members {
        let manifest = &member.image.manifest;
        let (process, identity) = (&manifest.process, &manifest.identity);
        let phases = manifest.stop_phases_us.map(output::micros);
        line("process", process.pid.to_string());
        line("command", output::words(&process.cmdline).join(" "));
        line("program", output::text(&process.exe));
        line("directory", output::text(&process.cwd));
        line("user, group", format!("{}, {}", identity.uid, identity.gid));
        line(
            "host",
            format!("{}, Linux {}", identity.hostname, identity.kernel),
        );
        line(
            "stop phases",
            format!(
                "park {}, collect {}, snapshot {}, release {}",
                phases[0], phases[1], phases[2], phases[3]
            ),
        );
        line("image", member.path.display().to_string());
        for link in &member.older {
            line("stands on", link.path.display().to_string());
        }
    }
    table.print_body();
}

fn maps(manifest: &Manifest) -> Table {
    let mut table = Table::new(&["ADDRESS", "PROT", ">SIZE", ">STORED", "WHAT"]);
    for vma in &manifest.memory.vmas {
        table.row(vec![
            format!("{:x}-{:x}", vma.start, vma.end),
            protection(vma),
            output::size(vma.end - vma.start),
            output::size(stored_bytes(manifest, vma)),
            kind_of(manifest, vma),
        ]);
    }
    table
}

fn protection(vma: &VmaState) -> String {
    let shared = match vma.kind {
        VmaKind::FileShared { .. } | VmaKind::Shared { .. } => 's',
        _ => 'p',
    };
    let mut text = String::new();
    for (bit, letter) in [
        (libc::PROT_READ, 'r'),
        (libc::PROT_WRITE, 'w'),
        (libc::PROT_EXEC, 'x'),
    ] {
        text.push(if vma.prot & bit as u32 != 0 {
            letter
        } else {
            '-'
        });
    }
    text.push(shared);
    text
}

/// Bytes of this area that are in the image.
fn stored_bytes(manifest: &Manifest, vma: &VmaState) -> u64 {
    let extents = &manifest.memory.extents;
    let first = extents.partition_point(|e| e.addr + e.npages * PAGE <= vma.start);
    extents[first..]
        .iter()
        .take_while(|e| e.addr < vma.end)
        .map(|e| vma.end.min(e.addr + e.npages * PAGE) - vma.start.max(e.addr))
        .sum()
}

fn kind_of(manifest: &Manifest, vma: &VmaState) -> String {
    match &vma.kind {
        VmaKind::Anon => String::new(),
        VmaKind::Stack => "[stack]".to_owned(),
        VmaKind::Heap => "[heap]".to_owned(),
        VmaKind::FilePrivate { path, offset } | VmaKind::FileShared { path, offset, .. } => {
            format!("{} +{offset:#x}", output::text(path))
        }
        VmaKind::Shared { object, offset } | VmaKind::PrivateOf { object, offset } => {
            let how = match vma.kind {
                VmaKind::Shared { .. } => "shared",
                _ => "private copy of",
            };
            let name = manifest.memory.shared.get(*object as usize);
            let name = name.map_or(String::new(), |object| output::text(&object.name));
            format!("{how} {name} +{offset:#x}")
        }
    }
}

fn threads(manifest: &Manifest) -> Table {
    let mut table = Table::new(&[">TID", "NAME", "POLICY", ">NICE", "PENDING"]);
    for thread in &manifest.threads {
        let pending = thread.pending.iter().map(|p| p.signo.to_string());
        table.row(vec![
            thread.tid.to_string(),
            output::text(&thread.name),
            policy(thread.sched.policy).to_owned(),
            thread.sched.nice.to_string(),
            pending.collect::<Vec<_>>().join(" "),
        ]);
    }
    table
}

fn policy(number: u32) -> &'static str {
    match number {
        0 => "other",
        1 => "fifo",
        2 => "rr",
        3 => "batch",
        5 => "idle",
        6 => "deadline",
        _ => "?",
    }
}

fn descriptors(manifest: &Manifest) -> Table {
    let mut table = Table::new(&[">FD", "KIND", ">POSITION", "FLAGS", "WHAT"]);
    for descriptor in &manifest.descriptors.fds {
        let Some(file) = manifest.descriptors.files.get(descriptor.file as usize) else {
            continue;
        };
        let (kind, what) = describe(&file.kind);
        table.row(vec![
            descriptor.fd.to_string(),
            kind.to_owned(),
            file.pos.to_string(),
            flags(file, descriptor.cloexec),
            what,
        ]);
    }
    table
}

fn flags(file: &OpenFileState, cloexec: bool) -> String {
    let flags = file.flags as i32;
    let access = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    };
    let mut words = vec![access];
    for (set, word) in [
        (flags & libc::O_APPEND != 0, "append"),
        (flags & libc::O_NONBLOCK != 0, "nonblock"),
        (cloexec, "cloexec"),
    ] {
        if set {
            words.push(word);
        }
    }
    words.join(",")
}

/// Kind in a word, and what it is.
fn describe(kind: &FileKind) -> (&'static str, String) {
    match kind {
        FileKind::Regular { path, size, .. } => (
            "file",
            format!("{} ({})", output::text(path), output::size(*size)),
        ),
        FileKind::Unlinked { path, size, .. } => (
            "unlinked",
            format!("{} ({})", output::text(path), output::size(*size)),
        ),
        FileKind::Directory { path, .. } => ("directory", output::text(path)),
        FileKind::Device { path, .. } => ("device", output::text(path)),
        FileKind::Tty { path, .. } => ("terminal", output::text(path)),
        FileKind::PtyMaster { index, .. } => ("pty master", format!("/dev/pts/{index}")),
        FileKind::Pipe {
            pipe,
            write_end,
            data,
            ..
        } => {
            let end = if *write_end { "write end" } else { "read end" };
            let bytes: usize = data.messages.iter().map(Vec::len).sum();
            ("pipe", format!("{pipe}, {end}, {bytes} bytes in it"))
        }
        FileKind::Fifo { path, .. } => ("fifo", output::text(path)),
        FileKind::Memfd { name, size, .. } => (
            "memfd",
            format!("{} ({})", output::text(name), output::size(*size)),
        ),
        FileKind::EventFd { count, .. } => ("eventfd", format!("count {count}")),
        FileKind::TimerFd { remaining_ns, .. } => (
            "timerfd",
            format!("{} left", output::micros(remaining_ns / 1000)),
        ),
        FileKind::SignalFd { mask } => ("signalfd", format!("mask {mask:#x}")),
        FileKind::Epoll { entries, .. } => ("epoll", format!("{} entries", entries.len())),
        FileKind::Inotify { watches, .. } => ("inotify", format!("{} watches", watches.len())),
        FileKind::PidFdSelf { .. } => ("pidfd", "of itself".to_owned()),
        FileKind::PidFdDead { .. } => ("pidfd", "of a process that is gone".to_owned()),
        FileKind::Socket(socket) => {
            let role = match socket.role {
                SocketRole::Idle => "idle",
                SocketRole::Listening { .. } => "listening",
                SocketRole::Pair { .. } => "both ends here",
                SocketRole::Queued { .. } => "not accepted yet",
                SocketRole::Ended => "ended by the other side",
                SocketRole::Outside => "to the outside: comes back reset",
            };
            ("socket", format!("family {}, {role}", socket.domain))
        }
        FileKind::Inherited { path, .. } => (
            "inherited",
            format!("{}: the new start's is taken", output::text(path)),
        ),
    }
}

/// `(path, use)` of each file that the checkpoint depends on, once.
fn file_list(manifest: &Manifest) -> Vec<(String, &'static str)> {
    let mut list = Vec::new();
    let mut add = |path: &[u8], role| {
        let path = output::text(path);
        if !list.iter().any(|(known, _)| *known == path) {
            list.push((path, role));
        }
    };
    for (index, object) in manifest.identity.objects.iter().enumerate() {
        add(&object.path, if index == 0 { "program" } else { "library" });
    }
    for file in &manifest.descriptors.files {
        if let FileKind::Regular { path, .. } = &file.kind {
            add(path, "open");
        }
    }
    for vma in &manifest.memory.vmas {
        match &vma.kind {
            VmaKind::FilePrivate { path, .. } => add(path, "mapped"),
            VmaKind::FileShared { path, .. } => add(path, "mapped, shared"),
            _ => {}
        }
    }
    list
}

fn files(manifest: &Manifest) -> Table {
    let mut table = Table::new(&["USE", "FILE"]);
    for (path, role) in file_list(manifest) {
        table.row(vec![role.to_owned(), path]);
    }
    table
}

/// What was modified since, as far as it is known, with what is kept of it.
fn modified(job: &Job<RawFs>, found: &Found<RawFs>) -> anyhow::Result<Table> {
    let mut table = Table::new(&["FILE", "MTIME", "MODE", ">SIZE", "KEPT"]);
    for row in diff::rows(&job.dir, found.record.generation)? {
        let unmodified = || "-1".to_owned();
        table.row(vec![
            output::text(&row.path),
            row.mtime_ns
                .map_or_else(unmodified, |ns| output::time(ns.max(0) as u64)),
            row.mode
                .map_or_else(unmodified, |mode| format!("{:o}", mode & 0o7777)),
            row.size.map_or_else(unmodified, |size| size.to_string()),
            if row.kept.is_empty() {
                "-".to_owned()
            } else {
                row.kept
            },
        ]);
    }
    Ok(table)
}

fn modified_json(job: &Job<RawFs>, found: &Found<RawFs>) -> anyhow::Result<Value> {
    let rows = diff::rows(&job.dir, found.record.generation)?;
    let rows = rows.iter().map(|row| {
        json!({
            "path": output::text(&row.path),
            "mtime_ns": row.mtime_ns,
            "mode": row.mode.map(|mode| format!("{:o}", mode & 0o7777)),
            "owner": row.owner.map(|(uid, gid)| json!({ "uid": uid, "gid": gid })),
            "size": row.size,
            "kept": row.kept,
        })
    });
    Ok(Value::Array(rows.collect()))
}

fn member_json(args: &Args, manifest: &Manifest) -> Value {
    let (process, identity) = (&manifest.process, &manifest.identity);
    let mut value = json!({
        "pid": process.pid,
        "command": output::words(&process.cmdline),
        "exe": output::text(&process.exe),
        "cwd": output::text(&process.cwd),
        "uid": identity.uid,
        "gid": identity.gid,
        "host": identity.hostname,
        "kernel": identity.kernel,
        "stop_phases_us": {
            "park": manifest.stop_phases_us[0],
            "collect": manifest.stop_phases_us[1],
            "snapshot": manifest.stop_phases_us[2],
            "release": manifest.stop_phases_us[3],
        },
    });
    if args.wants(args.maps) {
        let vmas = manifest.memory.vmas.iter().map(|vma| {
            json!({
                "start": format!("{:#x}", vma.start),
                "end": format!("{:#x}", vma.end),
                "prot": protection(vma),
                "stored": stored_bytes(manifest, vma),
                "what": kind_of(manifest, vma),
            })
        });
        value["maps"] = Value::Array(vmas.collect());
    }
    if args.wants(args.threads) {
        let threads = manifest.threads.iter().map(|thread| {
            json!({
                "tid": thread.tid,
                "name": output::text(&thread.name),
                "policy": policy(thread.sched.policy),
                "nice": thread.sched.nice,
                "pending": thread.pending.iter().map(|p| p.signo).collect::<Vec<_>>(),
            })
        });
        value["threads"] = Value::Array(threads.collect());
    }
    if args.wants(args.descriptors) {
        let table = &manifest.descriptors;
        let descriptors = table.fds.iter().filter_map(|descriptor| {
            let file = table.files.get(descriptor.file as usize)?;
            let (kind, what) = describe(&file.kind);
            Some(json!({
                "fd": descriptor.fd,
                "file": descriptor.file,
                "kind": kind,
                "what": what,
                "position": file.pos,
                "flags": flags(file, descriptor.cloexec),
            }))
        });
        value["descriptors"] = Value::Array(descriptors.collect());
    }
    if args.wants(args.files) {
        let files = file_list(manifest);
        let files = files
            .iter()
            .map(|(path, role)| json!({ "path": path, "use": role }));
        value["files"] = Value::Array(files.collect());
    }
    value
}
