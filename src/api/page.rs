//! The page that a browser comes back to from an authorization server: readable by itself, without scripts, and nothing in
//! it but text.

use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_SECURITY_POLICY};
use axum::response::{Html, IntoResponse, Response};

const STYLE: &str = "body{font:1.1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1.5rem;\
                     color:#1c2330;background:#fff}h1{font-size:1.6rem}@media(prefers-color-scheme:dark){body{color:#e6e9ef;\
                     background:#12161d}}";

/// Nothing is loaded or run, and no form is sent; the style is known by its SHA-256.
const POLICY: &str = "default-src 'none'; style-src 'sha256-BYZzkwIrmpuQuv7lhcaUU6x7+zWCBofTkojSWEL0bo0='; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; sandbox";

/// A page with a heading and paragraphs, all plain text.
pub fn page(heading: &str, paragraphs: &[&str]) -> Response {
    let heading = escaped(heading);
    let paragraphs: String = paragraphs.iter().map(|text| format!("<p>{}</p>\n", escaped(text))).collect();
    let html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{heading} · Portolan</title>\n\
         <style>{STYLE}</style>\n<main>\n<h1>{heading}</h1>\n{paragraphs}</main>\n</html>\n"
    );
    ([(CONTENT_SECURITY_POLICY, POLICY)], Html(html)).into_response()
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Whether a client likes a page better than JSON (RFC 9110, 12.5.1). Browsers name `text/html`; what asks for anything
/// gets JSON.
pub fn is_preferred(headers: &HeaderMap) -> bool {
    let (mut page, mut json) = (None, None);
    for value in headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()) {
        for entry in value.split(',') {
            let mut parts = entry.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
            let weight: f32 = weight.map_or(1.0, |weight| weight.parse().unwrap_or(0.0));
            // The more a range says, the more it counts.
            let note = |of: &mut Option<(u8, f32)>, exact: u8| {
                if of.is_none_or(|(known, _)| known < exact) {
                    *of = Some((exact, weight));
                }
            };
            match kind.as_str() {
                "text/html" => note(&mut page, 2),
                "text/*" => note(&mut page, 1),
                "application/json" => note(&mut json, 2),
                "application/*" => note(&mut json, 1),
                "*/*" => {
                    note(&mut page, 0);
                    note(&mut json, 0);
                }
                _ => {}
            }
        }
    }
    let weight = |of: Option<(u8, f32)>| of.map_or(0.0, |(_, weight)| weight);
    weight(page) > weight(json)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use base64::prelude::{BASE64_STANDARD, Engine};
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_policy_names_the_style() {
        let hash = BASE64_STANDARD.encode(Sha256::digest(STYLE));
        assert!(POLICY.contains(&format!("style-src 'sha256-{hash}';")), "{hash}");
    }

    #[test]
    fn what_markup_means_is_written_as_text() {
        assert_eq!(escaped("<a href=\"x\">'&'</a>"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;");
    }

    #[test]
    fn browsers_get_a_page_and_programs_json() {
        const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8";
        for (accept, expected) in [
            (BROWSER, true),
            ("text/html", true),
            ("TEXT/HTML;Q=0.5", true),
            ("text/*, application/json;q=0.1", true),
            ("", false),
            ("*/*", false),
            ("application/json", false),
            ("application/json, text/html", false),
            ("application/json, text/plain, */*", false),
            ("text/html;q=0.1, application/json;q=0.2", false),
            ("text/html;q=0, */*", false),
            ("text/html;q=x", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, accept.parse().unwrap())]);
            assert_eq!(is_preferred(&headers), expected, "{accept}");
        }
        assert!(!is_preferred(&HeaderMap::new()));
    }
}
