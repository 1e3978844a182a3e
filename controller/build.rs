//! The console is embedded at build time: a change of its files is a change of this crate.

fn main() {
    println!("cargo::rerun-if-changed=web");
}
