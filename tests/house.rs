//! The house stays as the crate doc says: who imports whom, and a route table that is the OpenAPI document's.

use std::path::Path;

use portolan::api::Access;

use crate::harness::openapi;

#[test]
fn the_route_table_matches_openapi_yaml() {
    let table: Vec<_> =
        portolan::api::routes().iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    let mut documented = openapi::operations();
    let mut served = table;
    documented.sort();
    served.sort();
    assert_eq!(served, documented);
}

#[test]
fn openapi_yaml_names_the_scope_that_each_route_needs() {
    let scope = |access| match access {
        Access::Open => None,
        Access::Needs(scope) => Some(scope.as_str().to_owned()),
    };
    let table = portolan::api::routes();
    let mut served: Vec<_> =
        table.iter().map(|route| (route.method.to_string(), route.path.to_owned(), scope(route.access))).collect();
    let mut documented = openapi::scopes();
    documented.sort();
    served.sort();
    assert_eq!(served, documented);
}

/// Which of our own modules, and which guarded crates, a module may name: the crate doc's table.
fn may_import() -> Vec<(&'static str, Vec<&'static str>)> {
    let doc = include_str!("../src/lib.rs");
    let (_, section) = doc.split_once("//! # Who may import whom").expect("the crate doc says it");
    let section = section.split("//! # ").next().unwrap();
    let names = |cell: &'static str| cell.split('`').skip(1).step_by(2).collect::<Vec<_>>();
    let rows = section.lines().filter_map(|line| line.strip_prefix("//! | `")?.split_once("` |"));
    rows.map(|(module, allowed)| (module, names(allowed))).collect()
}

const OURS: [&str; 15] = [
    "api",
    "app",
    "command",
    "config",
    "corpus",
    "error",
    "interchange",
    "mcp",
    "model",
    "progress",
    "run_log",
    "secrets",
    "serve",
    "store",
    "telemetry",
];
const GUARDED: [&str; 3] = ["axum", "rmcp", "sqlx"];

fn sources(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_module_imports_only_what_the_map_allows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 20);
    let may_import = may_import();
    assert_eq!(may_import.len(), OURS.len() + 2, "ours, main and lib");
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap();
        let stem = module.trim_end_matches(".rs");
        let (_, allowed) = may_import.iter().find(|(name, _)| *name == stem).unwrap_or_else(|| {
            panic!("{module} is not on the map: add it to lib.rs");
        });
        let text = std::fs::read_to_string(&file).unwrap();
        // `use crate::{a, b}` counts as both; paths inside code count too.
        let code: String =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        let mut named: Vec<&str> = OURS
            .into_iter()
            .filter(|ours| {
                code.contains(&format!("crate::{ours}"))
                    || code.contains(&format!("portolan::{ours}"))
                    || in_braces(&code, ours)
            })
            .collect();
        named.extend(GUARDED.into_iter().filter(|name| code.contains(&format!("{name}::"))));
        for name in named {
            assert!(name == stem || allowed.contains(&name), "{} may not name {name}", relative.display());
        }
    }
}

/// Whether `name` stands at the top level of a `use crate::{…}`.
fn in_braces(code: &str, name: &str) -> bool {
    code.split("use crate::{").skip(1).any(|rest| {
        let mut depth = 1;
        let mut top = String::new();
        for character in rest.chars() {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ if depth == 1 => top.push(character),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        top.split(',').any(|part| part.trim().split("::").next() == Some(name))
    })
}

#[test]
fn nested_groups_hide_no_import() {
    let code = "use crate::{store::{Store, Error}, mcp, model::Tool};";
    assert!(in_braces(code, "store") && in_braces(code, "mcp") && in_braces(code, "model"));
    assert!(!in_braces(code, "Error") && !in_braces(code, "api"));
}

#[test]
fn the_map_names_every_file_but_those_that_their_routes_tables_and_commands_name() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let map = std::fs::read_to_string(src.join("lib.rs")).unwrap();
    let map = map.split("# Who may import whom").next().unwrap();
    for folder in ["mcp", "interchange", "serve"] {
        let mut files = Vec::new();
        sources(&src.join(folder), &mut files);
        assert!(!files.is_empty());
        for file in files {
            let stem = file.file_stem().unwrap().to_str().unwrap();
            assert!(stem == "mod" || map.contains(&format!("`{stem}`")), "{} is not on the map", file.display());
        }
    }
}
