//! Where browsers come back to: programs get an object, browsers a page that carries no markup of others.

use serde_json::json;

use crate::fake::oauth::Rules;
use crate::harness::{Answer, Portolan};

use super::{Kind, Upstream, Watch, registered, visit};

const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
const PATH: &str = "/v1/tools/mcp/oauth/callback";

async fn ask(portolan: &Portolan, path: &str, headers: &[(&str, &str)]) -> Answer {
    let request =
        headers.iter().fold(portolan.request("GET", path), |request, (name, value)| request.header(*name, *value));
    Answer::of("GET", path, request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_gets_a_page_and_a_program_an_object() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    for (accept, is_page) in [(BROWSER, true), ("*/*", false), ("application/json", false)] {
        let answer = ask(&portolan, &format!("{PATH}?state=unknown&code=c"), &[("accept", accept)]).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        if is_page {
            let policy = answer.header("content-security-policy").unwrap();
            assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
            assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
            assert!(answer.text.contains("<h1>Not signed in</h1>"), "{}", answer.text);
            assert!(answer.text.contains("Invalid or expired state parameter."), "{}", answer.text);
        } else {
            let wanted = json!({"status": "error", "message": "Invalid or expired state parameter"});
            assert_eq!(answer.expect(200), wanted);
        }
    }

    // A browser that comes from another site, by the link of the authorization server.
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let cross = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    let path = &back[url::Position::BeforePath..];
    // An image or a frame of another site is no link that a user follows.
    for (name, value) in [("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "iframe")] {
        let headers: Vec<_> =
            cross.iter().filter(|(other, _)| *other != name).copied().chain([(name, value)]).collect();
        assert_eq!(ask(&portolan, path, &headers).await.expect(403)["code"], "origin_not_allowed");
    }
    // A look at the link does not use it up.
    assert_eq!(portolan.send("HEAD", path, None).await.status, 200);
    let page = ask(&portolan, path, &[&cross[..], &[("accept", BROWSER)]].concat()).await;
    assert!(page.text.contains("<h1>Signed in</h1>") && page.text.contains(&upstream.server.url), "{}", page.text);
    watch.success().await;
    // Elsewhere such a link leads nowhere.
    let elsewhere = ask(&portolan, "/v1/mcp-servers/", &cross).await;
    assert_eq!(elsewhere.expect(403)["code"], "origin_not_allowed");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_link_says_becomes_markup() {
    let upstream = Upstream::start(Kind::Http, Rules { refuses: true, ..Rules::default() });
    let (portolan, id) = registered(&upstream).await;
    const MARKUP: &str = "%3Cscript%3Ealert(1)%3C/script%3E%22%27";
    for name in ["state", "code", "error", "error_description", "iss", "other"] {
        for accept in [BROWSER, "application/json"] {
            let answer = ask(&portolan, &format!("{PATH}?state=s&{name}={MARKUP}"), &[("accept", accept)]).await;
            assert!(!answer.text.contains("<script") && !answer.text.contains("alert"), "{}", answer.text);
        }
    }
    // What the authorization server says of a sign-in that is under way is told, as text.
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let path = &back[url::Position::BeforePath..];
    let page = ask(&portolan, path, &[("accept", BROWSER)]).await;
    assert!(page.text.contains("OAuth error: access_denied - The user &lt;b&gt;said&lt;/b&gt; no."), "{}", page.text);
    watch.failure().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_says_each_thing_once() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let answer = portolan.get(PATH).await.expect(200);
    assert_eq!(answer, json!({"status": "error", "message": "Missing state parameter"}));
    let answer = portolan.get(&format!("{PATH}?state=&code=c")).await.expect(200);
    assert_eq!(answer, json!({"status": "error", "message": "Missing state parameter"}));
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let path = &back[url::Position::BeforePath..];
    let twice = portolan.get(&format!("{path}&state=other")).await.expect(200);
    assert_eq!(twice["status"], "error", "{twice}");
    assert!(twice["message"].as_str().unwrap().starts_with("OAuth callback failed: "), "{twice}");
    // Letta's older path, and nothing was used up.
    let older = path.replacen("callback?", "callback/mcp-oauth-0123abcd?", 1);
    assert_eq!(portolan.get(&older).await.expect(200)["status"], "success");
    watch.success().await;
    portolan.get(&format!("{PATH}/a%20b?state=s")).await.expect(404);
    portolan.stop().await;
}
