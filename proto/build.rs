//! Generates the Rust of the contracts; needs `protoc` on the path.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = ["turnpike/v1/fleet.proto", "turnpike/v1/steering.proto", "turnpike/v1/admin.proto"];
    let descriptors = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("turnpike.v1.bin");
    tonic_prost_build::configure().file_descriptor_set_path(descriptors).compile_protos(&protos, &["."])?;
    Ok(())
}
