//! The table of requirements is complete, and names tests that there are.

use std::{collections::HashSet, fs, path::Path};

const ROWS: [(&str, usize); 4] = [("A", 25), ("F", 60), ("W", 46), ("K", 24)];

/// Every `fn` of every Rust file below the folder, by name.
fn functions(folder: &Path, found: &mut HashSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            functions(&path, found);
        } else if name.ends_with(".rs") {
            let source = fs::read_to_string(&path).unwrap();
            let names = source.split("fn ").skip(1).filter_map(|rest| rest.split('(').next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn the_table_of_requirements_is_complete_and_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let table = fs::read_to_string(root.join("docs/requirements.md")).unwrap();
    let mut known = HashSet::new();
    functions(root, &mut known);
    let mut ids = HashSet::new();
    for line in table.lines() {
        let cells: Vec<_> = line.split(" | ").collect();
        let [id, _, state, tests] = cells[..] else { continue };
        let id = id.trim_start_matches("| ");
        if !id.ends_with(|last: char| last.is_ascii_digit()) {
            continue;
        }
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
        let partly = state.starts_with("partly: ");
        assert!(partly || state == "done" || state == "not yet", "{id}: {state}");
        for test in tests.split('`').skip(1).step_by(2) {
            let name = test.rsplit([':', ' ']).next().unwrap();
            assert!(known.contains(name), "{id} names {test}, which is not there");
        }
        assert!(state != "done" || tests.contains('`'), "{id} is done and names no test");
    }
    let expected: HashSet<_> = ROWS
        .iter()
        .flat_map(|(letter, count)| (1..=*count).map(move |n| format!("{letter}{n}")))
        .collect();
    assert_eq!(ids, expected);
}
