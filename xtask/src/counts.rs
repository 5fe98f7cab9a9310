//! How many tests passed and failed, told from what the test runners write.

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

/// Whose summary to look for.
///
/// Only one's, for what a failed test writes may contain the other's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Runner {
    Nextest,
    Libtest,
}

impl Counts {
    /// Takes in what a line tells, if it sums up a run.
    pub(crate) fn read(&mut self, runner: Runner, line: &str) {
        let line = without_colours(line);
        let Some(summary) = runner.summary(line.trim()) else {
            return;
        };
        let mut run = Self::default();
        for (number, what) in numbers(&summary) {
            match what.as_str() {
                "passed" => run.passed += number,
                "failed" | "timed out" | "exec failed" => run.failed += number,
                _ => {}
            }
        }
        match runner {
            // One summary for all, at the end.
            Runner::Nextest => *self = run,
            // One for each binary.
            Runner::Libtest => self.add(run),
        }
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl Runner {
    /// Returns the part with the numbers, where the line sums up a run.
    fn summary(self, line: &str) -> Option<String> {
        match self {
            // "Summary [   0.019s] 3/4 tests run: 2 passed (1 slow, 1 flaky), 1 failed"
            Self::Nextest => {
                let (_, summary) = line.strip_prefix("Summary [")?.split_once(" run: ")?;
                Some(without_brackets(summary))
            }
            // "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; finished in 0.00s"
            Self::Libtest => {
                let (_, summary) = line.strip_prefix("test result: ")?.split_once(". ")?;
                Some(summary.to_owned())
            }
        }
    }
}

fn numbers(summary: &str) -> impl Iterator<Item = (u64, String)> {
    summary.split([',', ';']).filter_map(|part| {
        let (number, what) = part.trim().split_once(' ')?;
        Some((number.parse().ok()?, what.trim().to_owned()))
    })
}

fn without_brackets(text: &str) -> String {
    let mut depth = 0_u32;
    text.chars()
        .filter(|c| match c {
            '(' => {
                depth += 1;
                false
            }
            ')' => {
                depth = depth.saturating_sub(1);
                false
            }
            _ => depth == 0,
        })
        .collect()
}

/// Removes the escape sequences that switch colours.
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // ESC, '[', parameters, and a letter that ends it.
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{Counts, Runner};

    fn count(runner: Runner, lines: &[&str]) -> (u64, u64) {
        let mut counts = Counts::default();
        for line in lines {
            counts.read(runner, line);
        }
        (counts.passed, counts.failed)
    }

    #[test]
    fn nextest_is_understood() {
        let plain = "     Summary [   0.019s] 3 tests run: 3 passed, 0 skipped";
        assert_eq!(count(Runner::Nextest, &[plain]), (3, 0));
        let long = "     Summary [  9.1s] 7/9 tests run: 4 passed (1 slow, 2 leaky), 1 failed, \
                    1 timed out, 1 exec failed, 2 skipped";
        assert_eq!(count(Runner::Nextest, &[plain, long]), (4, 3));
        let coloured = "\u{1b}[31;1m     Summary\u{1b}[0m [   0.019s] \u{1b}[1m1\u{1b}[0m test \
                        run: \u{1b}[1m0\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, \
                        \u{1b}[1m1\u{1b}[0m failed";
        assert_eq!(count(Runner::Nextest, &[coloured]), (0, 1));
    }

    #[test]
    fn libtest_is_understood() {
        let failed = "test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 0 filtered \
                      out; finished in 0.01s";
        let passed = "test result: ok. 1 passed; 0 failed; finished";
        assert_eq!(count(Runner::Libtest, &[failed, passed]), (6, 2));
        // What nextest shows of a failed test.
        assert_eq!(count(Runner::Nextest, &[failed]), (0, 0));
    }

    #[test]
    fn other_lines_count_nothing() {
        for line in ["PASS [   0.003s] 1 passed, 2 failed", "test a::b ... ok"] {
            assert_eq!(count(Runner::Nextest, &[line]), (0, 0));
            assert_eq!(count(Runner::Libtest, &[line]), (0, 0));
        }
    }
}
