//! The committed BPF object is what its source compiles to.

use std::process::Command;

use anyhow::{Context, Result};

/// The compiler that made the committed object: another version may choose other instructions.
const CLANG: &str = "clang version 14.";

#[test]
fn the_object_is_the_source_compiled() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let built = directory.path().join("sk_lookup.bpf.o");
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/bpf");
    let output = Command::new(format!("{here}/build")).arg(&built).output()?;
    anyhow::ensure!(output.status.success(), "bpf/build: {}", String::from_utf8_lossy(&output.stderr));
    let built = std::fs::read(built)?;
    let version = Command::new("clang").arg("--version").output().context("clang")?;
    if String::from_utf8_lossy(&version.stdout).contains(CLANG) {
        let committed = std::fs::read(format!("{here}/sk_lookup.bpf.o"))?;
        assert!(built == committed, "run relay-node/bpf/build and commit what it makes");
    }
    Ok(())
}
