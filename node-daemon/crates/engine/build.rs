//! Compiles the control protocols without `protoc`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (folder, file) in [
        (here.join("../../proto"), "engine.proto"),
        (here.join("../../../crds/proto"), "attach.proto"),
    ] {
        println!("cargo:rerun-if-changed={}", folder.join(file).display());
        let descriptors = protox::compile([file], [&folder])?;
        tonic_prost_build::configure().compile_fds(descriptors)?;
    }
    Ok(())
}
