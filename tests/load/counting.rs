//! The bench counts right: nothing where there is nothing, and everything that a broken forwarder does.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Runs it for a moment at a rate that any machine carries.
fn bench(arguments: &[&str]) -> Result<Vec<Value>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(["--rounds", "1", "--seconds", "0.3", "--flows", "8", "--rate", "2000", "--json"]).args(arguments);
    let output = command.stdin(Stdio::null()).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "bench {arguments:?}: {}: {error}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout)?;
    Ok(report["cells"].as_array().context("cells")?.clone())
}

fn count(cell: &Value, name: &str) -> u64 {
    cell["counts"][name].as_u64().unwrap_or(u64::MAX)
}

#[test]
fn what_is_relayed_is_counted_once_and_whole() -> Result<()> {
    let cells = bench(&["--servers", "relay,floor", "--only", "up,down,echo,pair,tcp-up,tcp-down"])?;
    // The floor speaks no TCP.
    ensure!(cells.len() == 6 + 4, "{} cells", cells.len());
    for cell in cells {
        ensure!(count(&cell, "sent") >= 600 && count(&cell, "delivered") == count(&cell, "sent"), "{cell}");
        for fault in ["lost", "duplicates", "corrupt", "misdelivered"] {
            ensure!(count(&cell, fault) == 0, "{fault}: {cell}");
        }
        ensure!(cell["cpu_us"].as_f64().is_some_and(|cost| cost > 0.1), "{cell}");
        ensure!(cell["p50_us"].as_f64().is_some_and(|latency| latency > 1.0), "{cell}");
    }
    Ok(())
}

#[test]
fn what_a_broken_forwarder_does_is_counted() -> Result<()> {
    let harms = [("corrupt", "corrupt"), ("duplicate", "duplicates"), ("misdeliver", "misdelivered"), ("drop", "lost")];
    for (tamper, counted) in harms {
        for cell in bench(&["--servers", "floor", "--only", "up,down,echo,pair", "--tamper", tamper])? {
            let (sent, mut seen) = (count(&cell, "sent"), count(&cell, counted));
            if tamper == "misdeliver" && cell["scene"] == "pair" {
                // What leaves by a third allocation finds no channel at the second one.
                seen += count(&cell, "lost");
            }
            // One of a hundred is tampered with; a pair passes the forwarder twice.
            ensure!(seen >= sent / 200 && seen <= sent / 20, "{tamper}: {cell}");
            for other in ["duplicates", "corrupt", "misdelivered"].iter().filter(|other| **other != counted) {
                ensure!(count(&cell, other) == 0, "{tamper}, {other}: {cell}");
            }
        }
    }
    Ok(())
}
