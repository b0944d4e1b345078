//! The console's files: what they are served with, that all of the page comes from here, and who gets them. What the page
//! does is tested with a browser.

use std::collections::BTreeSet;
use std::io::Read;

use flate2::read::GzDecoder;

use crate::harness::{Answer, Portolan};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
                      media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// Every file that the page loads, itself and through imports, with what it is.
async fn loaded(portolan: &Portolan) -> Vec<(String, Answer)> {
    let mut waiting = vec!["/".to_owned()];
    let mut known = BTreeSet::new();
    let mut files = Vec::new();
    while let Some(path) = waiting.pop() {
        if !known.insert(path.clone()) {
            continue;
        }
        let answer = portolan.get(&path).await;
        assert_eq!(answer.status, 200, "{path}");
        let quoted = |before: &str| {
            let parts: Vec<_> = answer.text.split(before).skip(1).collect();
            parts.into_iter().filter_map(|part| part.split('"').next()).map(str::to_owned).collect::<Vec<_>>()
        };
        match path.as_str() {
            "/" => waiting.extend([quoted("href=\""), quoted("src=\"")].concat()),
            path if path.ends_with(".js") && !path.ends_with("/preact.js") => {
                waiting.extend(quoted("from \"./").into_iter().map(|name| format!("/console/{name}")));
            }
            _ => {}
        }
        files.push((path, answer));
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_the_page_comes_from_here_and_nothing_else_may() {
    let portolan = Portolan::start().await;
    let page = portolan.get("/").await;
    assert_eq!(page.header("content-security-policy"), Some(POLICY));
    assert!(!page.text.contains("<style") && !page.text.contains(" style=") && !page.text.contains(" on"));
    for script in page.text.split("<script").skip(1) {
        let (tag, rest) = script.split_once('>').unwrap();
        assert!(tag.contains(" src=\"/console/") && rest.starts_with("</script>"), "{tag}");
    }
    assert!(page.text.contains("<noscript>"));

    let files = loaded(&portolan).await;
    for (path, answer) in &files {
        let kind = match path.rsplit_once('.').map(|(_, kind)| kind) {
            Some("js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("svg") => "image/svg+xml",
            Some("yaml") => "application/yaml",
            _ => "text/html; charset=utf-8",
        };
        let expected = [
            ("content-type", Some(kind)),
            ("cache-control", Some("no-cache")),
            ("vary", Some("accept-encoding")),
            ("referrer-policy", Some("no-referrer")),
            ("x-content-type-options", Some("nosniff")),
            ("cross-origin-resource-policy", Some("same-origin")),
            ("set-cookie", None),
            ("content-encoding", None),
        ];
        for (name, value) in expected {
            assert_eq!(answer.header(name), value, "{path} {name}");
        }
    }
    let names: Vec<_> = files.iter().map(|(path, _)| path.as_str()).collect();
    for name in
        ["app.js", "api.js", "preact.js", "servers.js", "add.js", "sign-in.js", "theme.js", "style.css", "icon.svg"]
    {
        assert!(names.contains(&format!("/console/{name}").as_str()), "{name} is not loaded: {names:?}");
    }
    portolan.stop().await;
}

/// Text of others becomes markup through these alone, so our modules have none of them.
#[tokio::test(flavor = "multi_thread")]
async fn no_module_makes_markup_or_code_out_of_text() {
    const SINKS: [&str; 13] = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "dangerouslySetInnerHTML",
        "srcdoc",
        "document.write",
        "DOMParser",
        "createContextualFragment",
        "eval(",
        "new Function",
        "document.cookie",
        " style=",
        "javascript:",
    ];
    let portolan = Portolan::start().await;
    let mut modules = 0;
    for (path, answer) in loaded(&portolan).await {
        if !path.ends_with(".js") || path.ends_with("/preact.js") {
            continue;
        }
        modules += 1;
        for sink in SINKS {
            assert!(!answer.text.contains(sink), "{path} has {sink}");
        }
    }
    assert!(modules > 10, "{modules}");
    // It is what a sink looks like in the library, which the policy keeps from using it.
    assert!(portolan.get("/console/preact.js").await.text.contains("innerHTML"));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_out_compressed_to_those_who_take_it() {
    let portolan = Portolan::start().await;
    for path in ["/", "/console/app.js", "/docs", "/docs/swagger-ui-bundle.js", "/openapi.yaml"] {
        let plain = portolan.get(path).await;
        let fetch = async |accept: &str| {
            let request = portolan.request("GET", path).header("accept-encoding", accept);
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), 200, "{path}");
            let coding = response.headers().get("content-encoding").map(|coding| coding.to_str().unwrap().to_owned());
            let mark = response.headers()["etag"].to_str().unwrap().to_owned();
            assert_eq!(Some(mark.as_str()), plain.header("etag"), "{path}");
            (coding, response.bytes().await.unwrap())
        };
        let (coding, packed) = fetch("gzip, deflate, br, zstd").await;
        assert_eq!(coding.as_deref(), Some("gzip"), "{path}");
        let mut text = String::new();
        GzDecoder::new(&packed[..]).read_to_string(&mut text).unwrap();
        assert_eq!(text, plain.text, "{path}");
        assert!(packed.len() < text.len(), "{path}");
        for accept in ["identity", "br", "gzip;q=0"] {
            let (coding, bytes) = fetch(accept).await;
            assert_eq!((coding, &bytes[..]), (None, plain.text.as_bytes()), "{path} {accept}");
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_browser_has_is_not_sent_again_until_it_is_another() {
    let portolan = Portolan::start().await;
    for path in ["/", "/console/style.css", "/docs"] {
        let mark = portolan.get(path).await.header("etag").unwrap().to_owned();
        let ask = async |method: &str, known: &str| {
            let request = portolan.request(method, path).header("if-none-match", known);
            Answer::of(method, path, request).await
        };
        for known in [mark.as_str(), "*", &format!("\"other\", {mark}")] {
            let unchanged = ask("GET", known).await;
            assert_eq!((unchanged.status, unchanged.text.as_str()), (304, ""), "{path} {known}");
            assert_eq!(unchanged.header("etag"), Some(mark.as_str()));
            assert_eq!(ask("HEAD", known).await.status, 304);
        }
        for known in ["W/\"0123456789abcdef\"", "\"\"", "x"] {
            let sent = ask("GET", known).await;
            assert_eq!(sent.status, 200, "{path} {known}");
            assert!(!sent.text.is_empty());
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_the_console_is_among_its_files() {
    let portolan = Portolan::start().await;
    for name in [
        "nope.js",
        "index.html",
        "package.json",
        "package-lock.json",
        "preact.source.js",
        ".npmrc",
        "app.js.gz",
        "APP.JS",
        "%2e%2e%2fopenapi.yaml",
        "..%2fdocs%2fdocs.js",
        "docs.js",
        "%ff",
        "app.js%00",
    ] {
        let answer = portolan.get(&format!("/console/{name}")).await;
        assert_eq!(answer.expect(404)["code"], "not_found", "{name}");
    }
    for path in ["/", "/console/app.js"] {
        assert_eq!(portolan.get(path).await.status, 200);
        let head = portolan.send("HEAD", path, None).await;
        assert_eq!((head.status, head.text.as_str()), (200, ""), "{path}");
        for method in ["POST", "PUT", "PATCH", "DELETE"] {
            assert_eq!(portolan.send(method, path, None).await.expect(405)["code"], "method_not_allowed", "{path}");
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_for_everybody_and_what_it_asks_for_needs_the_token() {
    const TOKEN: &str = "console-test-0123456789";
    let open = Portolan::start().await;
    let guarded = Portolan::start_with(|settings| settings.tokens.token = Some(TOKEN.to_owned().into())).await;
    for (portolan, token, needed) in [(&open, None, false), (&guarded, None, true), (&guarded, Some(TOKEN), true)] {
        let url = portolan.url("");
        // As a browser sends them from the page itself, and from another one.
        let fetch = async |path: &str, origin: &str, site: &str| {
            let request = portolan.request("GET", path).header("origin", origin).header("sec-fetch-site", site);
            let request = request.header("sec-fetch-mode", "cors").header("sec-fetch-dest", "empty");
            let request = if let Some(token) = token { request.bearer_auth(token) } else { request };
            Answer::of("GET", path, request).await
        };
        for path in ["/", "/console/app.js"] {
            assert_eq!(fetch(path, &url, "same-origin").await.status, 200, "{path}");
            assert_eq!(fetch(path, "https://evil.test", "cross-site").await.status, 403, "{path}");
        }
        let servers = fetch("/v1/mcp-servers/", &url, "same-origin").await;
        assert_eq!(servers.status, if needed && token.is_none() { 401 } else { 200 });
        assert_eq!(fetch("/v1/mcp-servers/", "https://evil.test", "cross-site").await.status, 403);
    }
    open.stop().await;
    guarded.stop().await;
}
