//! Manual pages and shell completions, made from the command's own definition.

use super::{Cli, Outcome};
use anyhow::Context;
use clap::CommandFactory;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write the manual pages into a directory
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    dir: PathBuf,
}

/// Print the completions for a shell
#[derive(Debug, clap::Args)]
pub struct CompletionArgs {
    shell: clap_complete::Shell,
}

pub fn man(args: &ManArgs) -> Outcome {
    let command = Cli::command();
    std::fs::create_dir_all(&args.dir).with_context(|| format!("create {}", args.dir.display()))?;
    clap_mangen::generate_to(command, &args.dir)
        .with_context(|| format!("write manual pages to {}", args.dir.display()))?;
    Ok(ExitCode::SUCCESS)
}

pub fn completions(args: &CompletionArgs) -> Outcome {
    let mut out = std::io::stdout().lock();
    clap_complete::generate(args.shell, &mut Cli::command(), "ckpt", &mut out);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        super::Cli::command().debug_assert();
    }
}
