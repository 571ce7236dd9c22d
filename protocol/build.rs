//! Generates the messages and ttrpc stubs from `proto/`, without `protoc`.

use std::{env, fs, io, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generators' own mod.rs begins with an inner attribute, which
    // `include!` does not take.
    fs::write(
        out.join("generated.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )
}
