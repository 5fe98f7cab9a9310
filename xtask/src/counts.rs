//! How many tests passed and failed, told from what the test runners write.

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl Counts {
    /// Adds what a line tells, if it sums up a run.
    pub(crate) fn read(&mut self, line: &str) {
        let line = without_colours(line);
        if let Some(summary) = summary(line.trim()) {
            for (number, what) in numbers(&summary) {
                match what.as_str() {
                    "passed" => self.passed += number,
                    "failed" | "timed out" | "exec failed" => self.failed += number,
                    _ => {}
                }
            }
        }
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Returns the part with the numbers, where the line sums up a run.
fn summary(line: &str) -> Option<String> {
    // nextest: "Summary [   0.019s] 3/4 tests run: 2 passed (1 slow, 1 flaky), 1 failed, 0 skipped"
    if line.starts_with("Summary [") {
        let (_, summary) = line.split_once(" run: ")?;
        return Some(without_brackets(summary));
    }
    // libtest: "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; finished in 0.00s"
    let (_, summary) = line.strip_prefix("test result: ")?.split_once(". ")?;
    Some(summary.to_owned())
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
    use super::Counts;

    fn count(line: &str) -> (u64, u64) {
        let mut counts = Counts::default();
        counts.read(line);
        (counts.passed, counts.failed)
    }

    #[test]
    fn nextest_is_understood() {
        let line = "     Summary [   0.019s] 3 tests run: 3 passed, 0 skipped";
        assert_eq!(count(line), (3, 0));
        let line = "     Summary [  9.1s] 7/9 tests run: 4 passed (1 slow, 2 leaky), 1 failed, \
                    1 timed out, 1 exec failed, 2 skipped";
        assert_eq!(count(line), (4, 3));
        let line = "\u{1b}[31;1m     Summary\u{1b}[0m [   0.019s] \u{1b}[1m1\u{1b}[0m test run: \
                    \u{1b}[1m0\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, \u{1b}[1m1\u{1b}[0m failed";
        assert_eq!(count(line), (0, 1));
    }

    #[test]
    fn libtest_is_understood() {
        let line = "test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 0 filtered \
                    out; finished in 0.01s";
        assert_eq!(count(line), (5, 2));
        assert_eq!(
            count("test result: ok. 1 passed; 0 failed; finished"),
            (1, 0)
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(count("PASS [   0.003s] 1 passed, 2 failed"), (0, 0));
        assert_eq!(count("test a::b ... ok"), (0, 0));
    }
}
