//! `turnctl import coturn` on Debian's own file.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use harness::cluster::binary;
use tempfile::tempdir;

#[test]
fn what_is_imported_from_debians_file_is_a_relay() -> Result<()> {
    let directory = tempdir()?;
    let output = Command::new(binary("turnctl")?).args(["import", "coturn", "/etc/turnserver.conf"]).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("no-rfc5780") && said.contains("0 not mapped"), "{said}");
    check(directory.path(), &String::from_utf8(output.stdout)?)?;

    // Whatever the file shows as an example, each option alone, is read; what comes of it is a relay's configuration.
    let file = directory.path().join("turnserver.conf");
    std::fs::write(
        &file,
        "listening-ip=127.0.0.1\nexternal-ip=198.51.100.7/127.0.0.1\nuse-auth-secret\nstatic-auth-secret=north\n\
         user=alice:secret\ndenied-peer-ip=192.0.2.0-192.0.2.77\nmin-port=50000\nmax-bps=64000\ntotal-quota=100\nno-tcp-relay\n\
         prometheus\nrelay-threads=1\nno-auth\n",
    )?;
    let import = |strict: &[&str]| {
        Command::new(binary("turnctl")?)
            .args(["import", "coturn"])
            .arg(&file)
            .args(strict)
            .output()
            .map_err(anyhow::Error::from)
    };
    let output = import(&[])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check(directory.path(), &String::from_utf8(output.stdout)?)?;
    ensure!(import(&["--strict"])?.status.code() == Some(1), "no-auth is not mapped");
    Ok(())
}

fn check(directory: &Path, relay: &str) -> Result<()> {
    let file = directory.join("relay.toml");
    // A machine without a public address needs to be told.
    let public = if relay.contains("public_ip") { "" } else { "public_ip = \"198.51.100.7\"\n" };
    std::fs::write(&file, format!("{public}{relay}"))?;
    let output = Command::new(binary("relay-node")?).args(["--check-config", "--config"]).arg(&file).output()?;
    ensure!(output.status.success(), "{}{relay}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
