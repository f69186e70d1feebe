//! The house's own rules: ARCHITECTURE.md stays short and names only what is there.

use std::path::Path;

#[test]
fn architecture_is_short_and_its_paths_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert!(text.lines().count() < 150, "{} lines", text.lines().count());
    let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).collect();
    let is_path = |word: &&&str| {
        let known = ["src/", "kernels/", "tests/", "tools/", "assets/", "benches/", ".ci/"];
        known.iter().any(|folder| word.starts_with(folder)) && !word.contains(['<', '*', ' '])
    };
    let paths: Vec<&&str> = quoted.iter().filter(is_path).collect();
    assert!(paths.len() > 30, "ARCHITECTURE.md names {} paths", paths.len());
    for path in paths {
        assert!(root.join(path).exists(), "ARCHITECTURE.md names {path}, which is not there");
    }
}

#[test]
fn readme_names_the_two_commands() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    for command in ["./tools/demo.sh \"a fox in a pine forest at night\"", "./tools/test.sh"] {
        assert!(text.contains(command), "{command}");
    }
}
