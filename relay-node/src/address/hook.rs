//! The program that moves an address where the network itself will not: a cloud's API, a router.

use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// Longest that a hook may run.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `HOOK up|down ADDRESS INTERFACE`; what it writes is not read.
///
/// # Errors
/// One line: it cannot be run, fails, or does not end within 10 s (then it is killed).
pub(super) async fn run(hook: &Path, up: bool, address: IpAddr, interface: &str) -> Result<(), String> {
    let mut command = Command::new(hook);
    command.args([if up { "up" } else { "down" }, &address.to_string(), interface]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let status = async { command.spawn()?.wait().await };
    match timeout(PATIENCE, status).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{}: {status}", hook.display())),
        Ok(Err(error)) => Err(format!("{}: {error}", hook.display())),
        Err(_) => Err(format!("{} has not ended within {} s", hook.display(), PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn it_is_told_what_to_do_and_its_failure_is_seen() -> std::io::Result<()> {
        let directory = tempfile::tempdir()?;
        let hook = directory.path().join("hook");
        std::fs::write(&hook, "#!/bin/sh\necho \"$@\" >> \"$0.log\"\n[ \"$1\" = up ]\n")?;
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755))?;
        let address = [198, 51, 100, 7].into();
        assert_eq!(run(&hook, true, address, "eth0").await, Ok(()));
        let failure = run(&hook, false, address, "eth0").await.expect_err("exit status 1");
        assert!(failure.contains("exit status: 1"), "{failure}");
        let log = std::fs::read_to_string(directory.path().join("hook.log"))?;
        assert_eq!(log, "up 198.51.100.7 eth0\ndown 198.51.100.7 eth0\n");
        let failure = run(&directory.path().join("none"), true, address, "eth0").await.expect_err("not there");
        assert!(!failure.contains('\n'), "{failure}");
        Ok(())
    }
}
