//! `atomizer completions SHELL`.

use atomizer_programs::{Exit, write};
use clap::CommandFactory;
use clap_complete::{Shell, generate};

/// Prints what makes a shell complete the words of this command.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer completions bash > ~/.local/share/bash-completion/completions/atomizer
  atomizer completions zsh > \"${fpath[1]}/_atomizer\"
  atomizer completions fish > ~/.config/fish/completions/atomizer.fish")]
pub(crate) struct Arguments {
    /// The shell.
    shell: Shell,
}

pub(crate) fn run<C: CommandFactory>(arguments: &Arguments) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    generate(arguments.shell, &mut C::command(), "atomizer", &mut script);
    write(&script)?;
    Ok(Exit::Done)
}
