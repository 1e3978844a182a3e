//! `turnctl`: see `turnctl --help`.

fn main() -> std::process::ExitCode {
    turnctl::run()
}
