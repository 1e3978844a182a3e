//! Runs `turnctl conform` and `turnctl abuse` and reads what they found.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::cluster::{binary, target_directory};
use harness::{Host, Scenario};
use serde_json::Value;

use crate::servers::Server;

/// What a run found.
pub(crate) struct Report {
    value: Value,
}

/// What came of one check: outcome and what was seen, by transport.
pub(crate) type Found = BTreeMap<String, (String, String)>;

impl Report {
    /// Runs `turnctl <command>` on `host` against a server; the report stays in `<directory>/<name>.json`.
    ///
    /// # Errors
    /// turnctl gives no report.
    pub(crate) async fn of(
        command: &str,
        host: &Host,
        server: &Server,
        directory: &Path,
        name: &str,
        more: &[&str],
    ) -> Result<Self> {
        let mut turnctl = Command::new(binary("turnctl")?);
        turnctl.arg(command).args(&server.uris).args(&server.users).args(["-o", "json", "--label", server.label]);
        turnctl.arg("--server-ca").arg(&server.authority).args(more);
        let output = host.output(turnctl).await?;
        let error = String::from_utf8_lossy(&output.stderr);
        let value = serde_json::from_slice(&output.stdout).with_context(|| format!("turnctl {command}: {error}"))?;
        fs::write(directory.join(format!("{name}.json")), &output.stdout)?;
        Ok(Self { value })
    }

    /// A number of the summary.
    #[must_use]
    pub(crate) fn count(&self, key: &str) -> u64 {
        self.value["summary"][key].as_u64().unwrap_or_default()
    }

    /// What came of a check; empty if it did not run.
    #[must_use]
    pub(crate) fn found(&self, id: &str) -> Found {
        let checks = self.value["checks"].as_array().into_iter().flatten();
        let results = checks.filter(|row| row["id"] == id).filter_map(|row| row["results"].as_object()).flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        results.map(|(transport, found)| (transport.clone(), (text(&found["outcome"]), text(&found["seen"])))).collect()
    }

    /// Ids of the checks that failed over any transport, with what was seen.
    #[must_use]
    pub(crate) fn failed(&self) -> Vec<String> {
        let checks = self.value["checks"].as_array().into_iter().flatten();
        checks
            .filter_map(|row| {
                let id = row["id"].as_str()?;
                let seen: Vec<String> = self
                    .found(id)
                    .into_iter()
                    .filter(|(_, (outcome, _))| outcome == "fail")
                    .map(|(transport, (_, seen))| format!("{transport}: {seen}"))
                    .collect();
                (!seen.is_empty()).then(|| format!("{id} ({})", seen.join("; ")))
            })
            .collect()
    }

    /// Fails unless every check passed, was declined, or could not be tried for one of these reasons.
    ///
    /// # Errors
    /// The message names what failed.
    pub(crate) fn must_be_clean(&self) -> Result<()> {
        let failed = self.failed();
        ensure!(failed.is_empty(), "{} checks failed:\n  {}", failed.len(), failed.join("\n  "));
        ensure!(self.count("passed") > 0, "no check ran");
        Ok(())
    }

    /// Fails unless a check ran, and passed over every transport it is for.
    ///
    /// # Errors
    /// The message says what was seen.
    pub(crate) fn must_pass(&self, id: &str) -> Result<()> {
        let found = self.found(id);
        ensure!(!found.is_empty(), "{id} did not run");
        for (transport, (outcome, seen)) in found {
            ensure!(outcome == "pass", "{id} over {transport}: {outcome}: {seen}");
        }
        Ok(())
    }

    /// Fails unless these checks failed: what the server is known to do wrong is seen.
    ///
    /// # Errors
    /// The message names what was not seen.
    pub(crate) fn must_find(&self, ids: &[&str]) -> Result<()> {
        let failed = self.failed();
        let missed: Vec<_> =
            ids.iter().filter(|id| !failed.iter().any(|f| f.starts_with(&format!("{id} (")))).collect();
        ensure!(missed.is_empty(), "not found: {missed:?}; found were {failed:#?}");
        Ok(())
    }

    /// Shows the counts as figures.
    pub(crate) fn figures(&self, test: &Scenario, what: &str) {
        let count = |key| self.count(key);
        test.figure(
            &format!("{what}, {}", self.value["server"].as_str().unwrap_or_default()),
            format!(
                "{} passed, {} MUST and {} SHOULD failed, {} not offered, {} not applicable",
                count("passed"),
                count("failed_must"),
                count("failed_should"),
                count("not_offered"),
                count("not_applicable"),
            ),
        );
    }
}

/// Writes the runs of `directory` beside each other, as Markdown, where they outlive the test; says where.
///
/// # Errors
/// turnctl fails, or the file cannot be written.
pub(crate) async fn compare(test: &Scenario, runs: &[&str], name: &str) -> Result<()> {
    let mut command = Command::new(binary("turnctl")?);
    command.args(["conform", "-o", "markdown", "--compare"]);
    command.args(runs.iter().map(|run| test.file(&format!("{run}.json"))));
    let output = Host::Machine.output(command).await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let directory = target_directory().join("conform");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), &output.stdout)?;
    test.figure("comparison", format!("{name}, under conform/ of the target directory"));
    Ok(())
}
