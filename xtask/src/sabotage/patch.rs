//! A patch that breaks something, and the test that has to notice.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

/// One file of patches.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Patch {
    pub(crate) name: String,
    pub(crate) test: Test,
    /// The files it changes, below the root.
    pub(crate) files: Vec<PathBuf>,
    /// What `git apply` takes.
    pub(crate) diff: String,
}

/// A test, as `cargo nextest list` names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Test {
    /// The id of the binary: a package, or what is in it after `::`.
    pub(crate) binary: String,
    /// The path of the test within the binary.
    pub(crate) path: String,
}

/// Reads all patches of a folder, in the order of their names.
pub(crate) fn read_all(folder: &Path) -> Result<Vec<Patch>> {
    let failed = || format!("failed to read {}", folder.display());
    let mut patches = Vec::new();
    for entry in fs::read_dir(folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.extension().is_none_or(|extension| extension != "patch") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let failed = || format!("failed to read {}", path.display());
        let text = fs::read_to_string(&path).with_context(failed)?;
        patches.push(Patch::parse(name, &text).with_context(failed)?);
    }
    patches.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(patches)
}

impl Patch {
    fn parse(name: String, text: &str) -> Result<Self> {
        let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
        let Some(test) = first.strip_prefix("test: ") else {
            bail!("the first line does not begin with `test: `");
        };
        let test = Test::parse(test)?;
        let start = rest.lines().take_while(|line| line.starts_with('#') || line.is_empty());
        let diff: String =
            rest.split_inclusive('\n').skip(start.count()).collect::<Vec<_>>().concat();
        ensure!(diff.starts_with("diff --git "), "what follows is no diff as git makes it");
        // Within a diff every other line begins with something else.
        let files = diff.lines().filter_map(|line| line.strip_prefix("diff --git ")).map(file);
        let files = files.collect::<Result<_>>()?;
        Ok(Self { name, test, files, diff })
    }
}

/// Tells the file from `a/FILE b/FILE`.
fn file(both: &str) -> Result<PathBuf> {
    let middle = both.len() / 2;
    let halves = both
        .split_at_checked(middle)
        .and_then(|(left, right)| Some((left.strip_prefix("a/")?, right.strip_prefix(" b/")?)));
    match halves {
        Some((left, right)) if left == right && !left.is_empty() => Ok(left.into()),
        _ => bail!("`{both}` is not one file: renames and quoted names are not understood"),
    }
}

impl Test {
    fn parse(name: &str) -> Result<Self> {
        match name.trim().split_once(' ') {
            Some((binary, path)) if !binary.is_empty() && !path.contains(' ') => {
                Ok(Self { binary: binary.to_owned(), path: path.to_owned() })
            }
            _ => bail!("`{name}` is not the id of a binary and the path of a test"),
        }
    }

    /// Returns the package it is in.
    pub(crate) fn package(&self) -> &str {
        self.binary.split_once("::").map_or(self.binary.as_str(), |(package, _)| package)
    }

    /// Returns what selects its binary, for `cargo test`.
    pub(crate) fn target(&self) -> Result<Vec<&str>> {
        let Some((_, target)) = self.binary.split_once("::") else { return Ok(vec!["--lib"]) };
        Ok(match target.split_once('/') {
            None => vec!["--test", target],
            Some(("bin", name)) => vec!["--bin", name],
            Some(("example", name)) => vec!["--example", name],
            Some((kind, _)) => bail!("binaries of the kind `{kind}` are not understood"),
        })
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.binary, self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{Patch, Test};

    const DIFF: &str = "\
diff --git a/atomizer/src/memory.rs b/atomizer/src/memory.rs
index 0123456..789abcd 100644
--- a/atomizer/src/memory.rs
+++ b/atomizer/src/memory.rs
@@ -1,2 +1,1 @@
 one
--- a/not/a/file
diff --git a/a b/c.rs b/a b/c.rs
--- /dev/null
+++ b/a b/c.rs
";

    #[test]
    fn a_patch_names_its_test_and_its_files() {
        for comment in ["", "# why\n# and why not\n", "#\n\n"] {
            let text = format!("test: atomizer::it ends::a_panic\n{comment}{DIFF}");
            let patch = Patch::parse("name".into(), &text).unwrap();
            assert_eq!(
                patch.test,
                Test { binary: "atomizer::it".into(), path: "ends::a_panic".into() }
            );
            let files = ["atomizer/src/memory.rs", "a b/c.rs"].map(PathBuf::from);
            assert_eq!(patch.files, files);
            assert_eq!(patch.diff, DIFF);
        }
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        let rename = "diff --git a/one.rs b/two.rs\n";
        for text in [
            "",
            DIFF,
            "test: atomizer::it ends::a_panic",
            "test: atomizer::it ends::a_panic\n# nothing\n",
            "test: atomizer::it ends::a_panic\nwhatever\n",
            &format!("test:\n{DIFF}"),
            &format!("test: a_panic\n{DIFF}"),
            &format!("test: atomizer::it ends a panic\n{DIFF}"),
            &format!("# why\ntest: atomizer::it ends::a_panic\n{DIFF}"),
            &format!("test: atomizer::it ends::a_panic\n{rename}"),
        ] {
            assert!(Patch::parse("name".into(), text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_binary_is_selected_by_its_id() {
        for (name, package, target) in [
            ("atomizer admission::tests::fair", "atomizer", &["--lib"][..]),
            ("atomizer::it ends::a_panic", "atomizer", &["--test", "it"]),
            ("atomizer-xtask::bin/xtask counts", "atomizer-xtask", &["--bin", "xtask"]),
            ("a::example/b c", "a", &["--example", "b"]),
        ] {
            let test = Test::parse(name).unwrap();
            assert_eq!(test.package(), package);
            assert_eq!(test.target().unwrap(), target);
            assert_eq!(test.to_string(), name);
        }
        assert!(Test::parse("a::bench/b c").unwrap().target().is_err());
    }
}
