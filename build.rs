//! Packs what browsers are given into the program: each file compressed, with its type and a mark of its content.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use swagger_ui_redist::SwaggerUi;

/// Files that are not for browsers: what the library is built from, and by.
fn is_served(name: &str) -> bool {
    content_type(name).is_some() && !name.ends_with(".source.js")
}

fn content_type(name: &str) -> Option<&'static str> {
    Some(match name.rsplit_once('.')?.1 {
        "html" => "text/html; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "yaml" => "application/yaml",
        _ => return None,
    })
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=console");
    println!("cargo::rerun-if-changed=openapi.yaml");

    let read = |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files = vec![("openapi.yaml".to_owned(), read(Path::new("openapi.yaml")))];
    for entry in std::fs::read_dir("console").expect("the console is beside this file").flatten() {
        let name = entry.file_name().into_string().expect("the console's names are ASCII");
        if is_served(&name) {
            files.push((format!("console/{name}"), read(&entry.path())));
        }
    }
    let library = SwaggerUi::static_files().iter().map(|(known, bytes)| (known.file_name(), bytes.to_vec()));
    files.extend(library.map(|(name, bytes)| (format!("docs/{name}"), bytes)));
    for name in ["docs.html", "docs.js"] {
        println!("cargo::rerun-if-changed=src/api/{name}");
        files.push((format!("docs/{name}"), read(&Path::new("src/api").join(name))));
    }
    files.sort();

    let out = std::env::var_os("OUT_DIR").expect("Cargo sets it");
    let out = Path::new(&out);
    let (mut table, mut count) = (String::new(), 0);
    for (place, (path, bytes)) in files.iter().enumerate() {
        let Some(kind) = content_type(path) else { continue };
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).expect("memory takes everything");
        let packed = out.join(format!("{place}.gz"));
        std::fs::write(&packed, encoder.finish().expect("memory takes everything")).expect("OUT_DIR can be written to");
        let mark: String = Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        writeln!(
            table,
            "Asset {{ path: {path:?}, kind: {kind:?}, mark: {mark:?}, packed: include_bytes!({packed:?}), plain: OnceLock::new() }},"
        )
        .expect("memory takes everything");
        count += 1;
    }
    let table = format!("/// In the order of their paths.\nstatic ASSETS: [Asset; {count}] = [\n{table}];\n");
    std::fs::write(out.join("assets.rs"), table).expect("OUT_DIR can be written to");
}
