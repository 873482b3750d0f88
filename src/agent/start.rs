//! The constructor: pre-execution (FIG. 5).
//!
//! Before main, one thread. Reads and validates the environment, wakes the agent,
//! lays the call-site net, decides between a normal start and a recovery, and starts
//! the clock in transparent mode. Called by `ckpt-preload`'s constructor; every
//! process that loads the library pays for it, so it does as little as it can.

use crate::agent::callsites;
use crate::agent::collect::credentials::credentials;
use crate::agent::collect::descriptors::inherited_now;
use crate::agent::collect::process::limits;
use crate::agent::collect::threads::affinity;
use crate::agent::outputs::given;
use crate::agent::recover;
use crate::agent::settings::{self, Settings};
use crate::agent::state::{self, AGENT};
use crate::agent::track::Probe;
use crate::agent::{exit, globs, headroom, helper, hooks, log, refusal, request, stop};
use crate::config::Config;
use crate::persist::exclude;
use crate::store::{self, JobKey, Owner};
use ckpt_sys::syscall;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;

/// Exit status of a failure of our own (env(1) uses 125 as well).
const OUR_FAILURE: i32 = 125;

unsafe extern "C" {
    static mut environ: *mut *mut libc::c_char;
}

/// One line on standard error and the documented exit status.
pub fn give_up(message: std::fmt::Arguments<'_>) -> ! {
    log::complain(message);
    log::line(message);
    loop {
        // SAFETY: ends the process before main; nothing of the program has run.
        unsafe { syscall!(libc::SYS_exit_group, OUR_FAILURE) };
    }
}

/// The environment as `(name, value)` slices.
fn environment() -> Vec<(&'static [u8], &'static [u8])> {
    let mut pairs = Vec::new();
    // SAFETY: one thread; libc's environ is a NULL-terminated array of C strings.
    unsafe {
        let mut at = environ;
        while !at.is_null() && !(*at).is_null() {
            let entry = std::ffi::CStr::from_ptr(*at).to_bytes();
            if let Some(eq) = entry.iter().position(|&b| b == b'=') {
                pairs.push((&entry[..eq], &entry[eq + 1..]));
            }
            at = at.add(1);
        }
    }
    pairs
}

/// Is this a variable that the configuration reads?
fn is_ours(name: &[u8]) -> bool {
    name.starts_with(b"CKPT_") || name == b"HOME" || name == b"XDG_STATE_HOME"
}

/// The whole of pre-execution. `rseq` is glibc's `(__rseq_offset, __rseq_size)`.
///
/// # Safety
/// The constructor of libckpt.so, once, before any other thread exists.
pub unsafe fn pre_execution(rseq: (i64, u32)) {
    // SAFETY: no pointers. Law 6: nothing in a set-uid process.
    if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
        return;
    }
    let env = environment();
    let ours: Vec<_> = env.into_iter().filter(|(name, _)| is_ours(name)).collect();
    let mut config = match Config::from_env(ours.iter().copied()) {
        Ok(config) => config,
        Err(error) => give_up(format_args!("{error}")),
    };
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
    // A process that a watched program started: the library is asleep in it. The
    // same process after an exec is awake.
    let owner = config
        .owner
        .as_deref()
        .and_then(crate::agent::procfs::number);
    if config.disable || owner.is_some_and(|owner| owner != pid as i64) {
        return;
    }
    std::panic::set_hook(Box::new(helper::on_panic));
    globs::follow_links(&mut config);
    AGENT.pid.store(pid, Ordering::SeqCst);
    AGENT.real_pid.store(pid, Ordering::SeqCst);
    AGENT.rseq_offset.store(rseq.0, Ordering::SeqCst);
    AGENT.rseq_size.store(rseq.1, Ordering::SeqCst);

    let root = match store::store_root(&config) {
        Ok(root) => root,
        Err(error) => give_up(format_args!("{error}")),
    };
    let key = job_key(&config);
    let before = jobs_before(&config, &key);
    if let (false, Ok(own)) = (before.is_empty(), Owner::current()) {
        exit::set_owner(&own.to_text(false));
        for dir in before
            .iter()
            .flat_map(|job| INSTANCES.map(|n| job.dir(&root, n)))
        {
            exit::add_before(dir.as_os_str().as_bytes());
        }
    }
    let own_env: Vec<(Vec<u8>, Vec<u8>)> =
        ours.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
    let inherited: Vec<(i32, u64, u64)> = inherited_now()
        .iter()
        .map(|i| (i.fd, i.dev, i.ino))
        .collect();
    let settings = Settings {
        config: config.clone(),
        env: own_env,
        job_key: key.as_str().as_bytes().to_vec(),
        store_root: root.as_os_str().as_bytes().to_vec(),
        restored: None,
        credentials: credentials(pid),
        outputs: given::empty_now(&inherited),
        inherited,
        limits: limits(),
        affinity: affinity(0),
    };
    // SAFETY: one thread.
    unsafe { settings::publish(Box::new(settings)) };

    // One that was asked for by name must work; what is best is found when it is needed.
    if let Some((name, why)) = Probe::for_name(config.tracker).objection(config.tracker) {
        give_up(format_args!(
            "CKPT_TRACKER={name} cannot be used here: {why}"
        ));
    }
    // A recovery replaces all memory: it needs none of what follows.
    recover::try_recover(&config, &root, &key);
    exclude_files(
        &config.exclude,
        &config.include,
        root.as_os_str().as_bytes(),
    );

    // SAFETY: constructor, one thread.
    unsafe {
        hooks::signal::adopt();
        if let Err(errno) = state::wake().and_then(|()| stop::install_handler()) {
            log::line(format_args!(
                "no checkpoints: cannot set up the stop signal, errno {errno}"
            ));
            state::sleep();
            return;
        }
    }
    hooks::touch_symbols();
    if let Some(path) = &config.audit
        // SAFETY: constructor, once, before the net is laid.
        && let Err(errno) = unsafe { hooks::files::audit::start(path, pid) }
    {
        give_up(format_args!("CKPT_AUDIT: cannot be written, errno {errno}"));
    }
    // SAFETY: constructor, once.
    let report = unsafe {
        callsites::install(&callsites::InstallOptions {
            cache: Some(root.join("cache")),
        })
    };
    AGENT
        .net_installed
        .store(report.covers_libc(), Ordering::SeqCst);
    callsites::summary::keep(&report);
    if !report.covers_libc() {
        log::line(format_args!("call-site net not laid: {:?}", report.objects));
        hooks::symbol::watch_exit();
    }
    refusal::set_wake(Some(request::wake));
    exit::configure(config.keep_on_exit);
    if let Some(signo) = config.trigger {
        // SAFETY: constructor, one thread.
        unsafe { request::install_trigger(signo) };
    }
    mark_owner(pid, &before, &key);
    // Where memory is limited the helper takes its own before the program takes all.
    if (config.interval.is_some() || headroom::limited())
        && let Err(errno) = helper::ensure()
    {
        log::line(format_args!(
            "no checkpoints: cannot start the helper thread, errno {errno}"
        ));
    }
    if hooks::files::audit::on() {
        hooks::files::audit::mark();
    }
}

/// Files that are left alone: the store's own and `CKPT_EXCLUDE`'s. In the constructor,
/// and in the restored helper where the new start says otherwise.
pub fn exclude_files(exclude: &[Vec<u8>], include: &[Vec<u8>], store: &[u8]) {
    exclude::set_store(store);
    let rules = exclude.iter().map(|glob| (true, glob));
    for (excludes, glob) in rules.chain(include.iter().map(|glob| (false, glob))) {
        if !exclude::add_rule(excludes, glob) {
            let glob = String::from_utf8_lossy(glob);
            log::line(format_args!("rule for files not in force: {glob}"));
        }
    }
}

fn job_key(config: &Config) -> JobKey {
    let exe = crate::agent::procfs::read_link(b"/proc/self/exe").unwrap_or_default();
    let cmdline = crate::agent::procfs::read_file(b"/proc/self/cmdline").unwrap_or_default();
    let cwd = crate::agent::procfs::read_link(b"/proc/self/cwd").unwrap_or_default();
    // SAFETY: no arguments.
    let uid = unsafe { syscall!(libc::SYS_getuid) } as u32;
    match &config.job {
        Some(name) => JobKey::named(name),
        None => JobKey::of_command(&exe, &cmdline, &cwd, uid),
    }
}

/// Instances of a job that are looked at after an exec.
const INSTANCES: [u32; 4] = [1, 2, 3, 4];

/// The jobs, other than `own`, of the programs that this process was before it called exec.
fn jobs_before(config: &Config, own: &JobKey) -> Vec<JobKey> {
    let owner = config.owner.as_deref().unwrap_or_default();
    let jobs = owner.split(|&byte| byte == b':').skip(1);
    let jobs = jobs.filter_map(JobKey::exact);
    jobs.filter(|job| job.as_str() != own.as_str()).collect()
}

/// Adds `CKPT_OWNER=<pid>:<job>` to the environment that children will get, with the jobs of
/// the programs before an exec. The array is
/// copied to our own memory: setenv(3) copes with an array it did not allocate.
fn mark_owner(pid: i32, before: &[JobKey], own: &JobKey) {
    // SAFETY: one thread; the old array stays valid, the new one is never freed.
    unsafe {
        let mut entries: Vec<*mut libc::c_char> = Vec::new();
        let mut at = environ;
        while !at.is_null() && !(*at).is_null() {
            if !std::ffi::CStr::from_ptr(*at)
                .to_bytes()
                .starts_with(b"CKPT_OWNER=")
            {
                entries.push(*at);
            }
            at = at.add(1);
        }
        let jobs = before
            .iter()
            .chain([own])
            .map(|job| format!(":{}", job.as_str()));
        let mark = format!("CKPT_OWNER={pid}{}\0", jobs.collect::<String>()).into_bytes();
        entries.push(Box::leak(mark.into_boxed_slice()).as_mut_ptr().cast());
        entries.push(std::ptr::null_mut());
        environ = Box::leak(entries.into_boxed_slice()).as_mut_ptr();
    }
}
