//! What of a connection is secret: which names and values say so, and where in a URL or an argument they stand.
//!
//! Answers mask it (CONTRACT row 6), and what a server says is shown without it. Rather one value too many: a mask that is
//! sent back changes nothing.

use std::iter::once;
use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::model::{Connector, Remote, Secret, Stdio};

/// What stands in place of a secret.
pub const MASK: &str = "********";

/// A name that contains one of these, in any case, is that of a secret.
const WORDS: [&str; 20] = [
    "key",
    "token",
    "secret",
    "sig",
    "auth",
    "pass",
    "pwd",
    "passwd",
    "passphrase",
    "cred",
    "bearer",
    "cookie",
    "session",
    "jwt",
    "private",
    "webhook",
    "dsn",
    "otp",
    "nonce",
    "salt",
];
/// Values that begin so are secrets, whatever their name, when something follows.
const PREFIXES: [&str; 37] = [
    "sk-",
    "sk_",
    "pk_live_",
    "rk_live_",
    "rk_test_",
    "whsec_",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "gldt-",
    "xox",
    "xapp-",
    "AKIA",
    "ASIA",
    "AIza",
    "ya29.",
    "eyJ",
    "SG.",
    "hf_",
    "npm_",
    "pypi-",
    "dop_v1_",
    "shpat_",
    "lin_api_",
    "ntn_",
    "secret_",
    "figd_",
    "nvapi-",
    "gsk_",
    "tvly-",
    "sbp_",
    "AGE-SECRET-KEY-",
    "-----BEGIN",
];
/// How much follows such a beginning at least, in bytes.
const AFTER_PREFIX: usize = 6;
/// A run of letters and digits as long as this, with some of both, was drawn by a machine.
const RANDOM_RUN: usize = 20;
/// As long as this, in words joined by these, where capitals, small letters and digits take turns.
const RANDOM_TEXT: usize = 24;
/// What is shorter says nothing, and may be part of any word.
const SHORTEST: usize = 4;

/// Whether the value of this variable, flag or parameter is secret by its name.
pub fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    WORDS.iter().any(|word| name.contains(word)) || matches!(&*name, "pw" | "pin" | "pat" | "code" | "sid")
}

/// Whether a text is a secret by its looks.
pub fn is_secret_value(text: &str) -> bool {
    let known = |prefix: &&str| text.len() >= prefix.len() + AFTER_PREFIX && text.starts_with(*prefix);
    PREFIXES.iter().any(known) || is_random(text)
}

fn is_random(text: &str) -> bool {
    let runs = text.split(|character: char| !character.is_ascii_alphanumeric());
    let drawn = |run: &str| {
        let digits = run.bytes().filter(u8::is_ascii_digit).count();
        run.len() >= RANDOM_RUN && digits >= 3 && run.len() - digits >= 3
    };
    if runs.clone().any(drawn) {
        return true;
    }
    let class = |byte: u8| match byte {
        b'0'..=b'9' => 0,
        b'a'..=b'z' => 1,
        b'A'..=b'Z' => 2,
        _ => 3,
    };
    let classes: Vec<_> = text.bytes().map(class).collect();
    let turns = classes.windows(2).filter(|pair| pair[0] != pair[1]).count();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'+' | b'/' | b'=');
    text.len() >= RANDOM_TEXT
        && text.bytes().all(is_word)
        && [0, 1, 2].iter().all(|wanted| classes.contains(wanted))
        && turns * 3 >= text.len()
}

/// Whether a variable of a child's environment is secret, by its name or its value.
pub fn is_secret_variable(name: &str, value: &str) -> bool {
    is_secret_name(name) || !secret_parts(value).is_empty()
}

/// A place in a URL that can hold a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spot {
    User,
    Password,
    /// A segment of the path, by its number.
    Segment(usize),
    /// The value of a query parameter, by the decoded name and how many of that name came before.
    Parameter(String, usize),
}

/// All such places of a URL that the URL parser takes, with their bytes.
pub fn spots(url: &str) -> Vec<(Spot, Range<usize>)> {
    let mut spots = Vec::new();
    let Some(authority) = url.find("://").map(|place| place + 3) else { return spots };
    let end_of = |from: usize, ends: &[char]| url[from..].find(ends).map_or(url.len(), |place| from + place);
    let path = end_of(authority, &['/', '?', '#']);
    if let Some(at) = url[authority..path].rfind('@').map(|place| authority + place) {
        match url[authority..at].find(':').map(|place| authority + place) {
            Some(colon) => {
                spots.push((Spot::User, authority..colon));
                spots.push((Spot::Password, colon + 1..at));
            }
            None => spots.push((Spot::User, authority..at)),
        }
    }
    let query = end_of(path, &['?', '#']);
    let mut start = path;
    for (number, segment) in url[path..query].split('/').enumerate() {
        spots.push((Spot::Segment(number), start..start + segment.len()));
        start += segment.len() + 1;
    }
    if url[query..].starts_with('?') {
        let end = end_of(query, &['#']);
        let mut start = query + 1;
        for pair in url[start..end].split('&') {
            if let Some((name, value)) = pair.split_once('=') {
                let name = decoded(name);
                let before =
                    spots.iter().filter(|(spot, _)| matches!(spot, Spot::Parameter(other, _) if *other == name));
                let before = before.count();
                let value_start = start + pair.len() - value.len();
                spots.push((Spot::Parameter(name, before), value_start..start + pair.len()));
            }
            start += pair.len() + 1;
        }
    }
    spots
}

/// A part of a URL without its percent signs.
pub fn decoded(part: &str) -> String {
    let hex = |byte: &u8| char::from(*byte).to_digit(16);
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        bytes.push(match (byte, after) {
            (b'%', [high, low, after @ ..]) if hex(high).is_some() && hex(low).is_some() => {
                rest = after;
                (hex(high).unwrap_or(0) * 16 + hex(low).unwrap_or(0)) as u8
            }
            _ => *byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Those of its places that hold a secret: the password, the values of parameters with secret names, and elsewhere what
/// looks like a secret.
pub fn secret_spots(url: &str) -> Vec<(Spot, Range<usize>)> {
    let mut spots = spots(url);
    spots.retain(|(spot, range)| {
        let text = &url[range.clone()];
        let by_place = match spot {
            Spot::Password => true,
            Spot::Parameter(name, _) => is_secret_name(name),
            Spot::User | Spot::Segment(_) => false,
        };
        !text.is_empty() && (by_place || is_secret_value(text))
    });
    spots
}

/// The secret parts of one text: an argument, or the value of a variable. What follows a secret name (`--token=…`,
/// `API_KEY=…`, `Authorization: …`), the secrets of a URL, and words that look like secrets.
pub fn secret_parts(text: &str) -> Vec<Range<usize>> {
    let named = text.find(['=', ':']).filter(|place| {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        *place > 0 && text[..*place].bytes().all(is_name) && !text[*place..].starts_with("://")
    });
    if let Some(place) = named {
        let value = value_start(text, place + 1);
        if is_secret_name(&text[..place]) {
            return (value < text.len()).then_some(value..text.len()).into_iter().collect();
        }
        let parts = secret_parts(&text[place + 1..]);
        if parts.is_empty() && is_secret_value(text) {
            return once(0..text.len()).collect();
        }
        return parts.into_iter().map(|part| part.start + place + 1..part.end + place + 1).collect();
    }
    if text.contains("://") && !text.contains(char::is_whitespace) {
        return secret_spots(text).into_iter().map(|(_, range)| range).collect();
    }
    words(text)
}

/// The secret parts of a text of several words: a command line, or JSON.
fn words(text: &str) -> Vec<Range<usize>> {
    let is_end = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ';' | '{' | '}' | '(' | ')');
    let mut parts = Vec::new();
    let mut start = 0;
    let mut follows = false;
    for piece in text.split_inclusive(is_end) {
        let word = piece.trim_end_matches(is_end);
        let range = start..start + word.len();
        start += piece.len();
        if word.len() == text.len() {
            parts.extend(is_secret_value(text).then_some(range));
        } else if word.chars().any(char::is_alphanumeric) {
            let name = word.trim_end_matches([':', '=']);
            let rest = text[range.start + name.len()..].trim_start_matches(['"', '\'', ' ']);
            let names = name.starts_with('-') || rest.starts_with([':', '=']);
            if follows && !is_flag(word) {
                // `Authorization: Bearer …`, in words.
                follows = ["bearer", "basic"].contains(&&*word.to_ascii_lowercase());
                parts.extend((!follows).then_some(range));
            } else {
                parts.extend(
                    secret_parts(word).into_iter().map(|part| part.start + range.start..part.end + range.start),
                );
                follows = names && is_secret_name(name) && !name.contains(['=', ':']);
            }
        }
    }
    parts
}

fn is_flag(arg: &str) -> bool {
    arg.starts_with("--") || (arg.len() == 2 && arg.starts_with('-'))
}

/// Where the secret begins in what follows a name: after white space and the word `Bearer`.
fn value_start(text: &str, from: usize) -> usize {
    let rest = text[from..].trim_start();
    let start = text.len() - rest.len();
    start + rest.len() - without_scheme(rest).len()
}

/// A value without `Bearer ` before it.
pub fn without_scheme(value: &str) -> &str {
    match value.split_at_checked(7) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer ") => rest,
        _ => value,
    }
}

/// The secret parts of each argument; what follows a flag with a secret name is one as a whole.
pub fn secret_args(args: &[String]) -> Vec<Vec<Range<usize>>> {
    let mut follows = false;
    let mut parts = Vec::with_capacity(args.len());
    for arg in args {
        if follows && !is_flag(arg) && !arg.is_empty() {
            let start = value_start(arg, 0);
            parts.push(once(start..arg.len()).collect());
            follows = false;
        } else {
            follows = arg.starts_with('-') && !arg.contains(['=', ':', ' ']) && is_secret_name(arg);
            parts.push(secret_parts(arg));
        }
    }
    parts
}

/// A text with [`MASK`] in place of these parts, which are in order.
pub fn without(text: &str, parts: &[Range<usize>]) -> String {
    let mut masked = text.to_owned();
    for part in parts.iter().rev() {
        masked.replace_range(part.clone(), MASK);
    }
    masked
}

/// All texts of a connection that nothing of what its server says may show.
pub fn of(connector: &Connector) -> Vec<Secret> {
    let mut secrets: Vec<Secret> = Vec::new();
    match connector {
        Connector::Stdio(Stdio { args, env, .. }) => {
            secrets.extend(env.iter().flatten().map(|(_, value)| value.clone()));
            for (arg, parts) in args.iter().zip(secret_args(args)) {
                secrets.extend(parts.into_iter().map(|part| arg[part].to_owned().into()));
            }
        }
        Connector::Sse(remote) | Connector::StreamableHttp(remote) => secrets.extend(of_remote(remote)),
    }
    let bare: Vec<Secret> = secrets.iter().map(|secret| without_scheme(secret.expose()).to_owned().into()).collect();
    secrets.extend(bare);
    secrets
}

fn of_remote(remote: &Remote) -> Vec<Secret> {
    let url = &remote.server_url;
    let headers = remote.custom_headers.iter().flatten().map(|(_, value)| value);
    let client_secret = remote.oauth.iter().flat_map(|client| &client.client_secret);
    let mut secrets: Vec<Secret> = headers.chain(&remote.auth_token).chain(client_secret).cloned().collect();
    let mut user = String::new();
    for (spot, range) in spots(url) {
        if spot == Spot::User {
            user = decoded(&url[range.clone()]);
        }
        if spot == Spot::Password {
            // As it is sent: HTTP Basic (RFC 7617).
            secrets.push(STANDARD.encode(format!("{user}:{}", decoded(&url[range]))).into());
        }
    }
    for (_, range) in secret_spots(url) {
        secrets.push(url[range.clone()].to_owned().into());
        secrets.push(decoded(&url[range]).into());
    }
    secrets
}

/// What a server said, without its own secrets.
pub fn scrub(text: &str, secrets: &[Secret]) -> String {
    // Each line of each value, the longest first: a shorter one may be a part of it.
    let mut values: Vec<&str> = secrets.iter().flat_map(|secret| secret.expose().lines()).map(str::trim).collect();
    values.retain(|value| value.len() >= SHORTEST);
    values.sort_by_key(|value| std::cmp::Reverse(value.len()));
    let mut text = text.to_owned();
    for value in values {
        text = text.replace(value, MASK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(args: &[&str]) -> Vec<String> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        args.iter().zip(secret_args(&args)).map(|(arg, parts)| without(arg, &parts)).collect()
    }

    #[test]
    fn names_and_values_that_look_secret() {
        for name in [
            "API_KEY",
            "apikey",
            "GITHUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "sig",
            "X-Amz-Signature",
            "Authorization",
            "PASSWORD",
            "PGPASSWORD",
            "MYSQL_PWD",
            "accessKeyId",
            "auth",
            "credentials",
            "pin",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
        for name in ["DEBUG", "PATH", "LANG", "REGION", "LOG_LEVEL", "K", "HOST", "page", "q", "team"] {
            assert!(!is_secret_name(name), "{name}");
        }
        for value in [
            "sk-proj-abc123",
            "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
            "xoxb-123-456-abc",
            "AKIAIOSFODNN7EXAMPLE",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
            "0123456789abcdef0123456789abcdef",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY0",
        ] {
            assert!(is_secret_value(value), "{value}");
        }
        for value in [
            "",
            "true",
            "4096",
            "sk-",
            "production",
            "/usr/lib/python3.11/site-packages",
            "@modelcontextprotocol/server-everything",
            "mcp-server-fetch-2024-11-05",
            "127.0.0.1:8080",
            "2026-11-21T02:45:36Z",
            "9faa85df-8741-4948-8341-e23da3699097",
            "a sentence of several words, with a number 5",
        ] {
            assert!(!is_secret_value(value), "{value}");
        }
        assert!(
            is_secret_variable("DATABASE", "postgres://user:pw@host/db") && is_secret_variable("OPTS", "--token=abc")
        );
        assert!(!is_secret_variable("DATABASE", "postgres://user@host/db") && !is_secret_variable("OPTS", "--verbose"));
    }

    #[test]
    fn a_url_hides_its_password_and_the_values_of_secret_parameters() {
        for (url, masked) in [
            ("https://host/mcp", "https://host/mcp"),
            ("https://user@host/mcp?team=1#f", "https://user@host/mcp?team=1#f"),
            ("https://user:pa:ss@w@host:1/mcp", "https://user:********@host:1/mcp"),
            ("https://:p@host", "https://:********@host"),
            ("https://user:@host/", "https://user:@host/"),
            ("https://ghp_16C7e42F292c6912E77@host/", "https://********@host/"),
            ("http://h?api_key=a&q=b&Token=c&x", "http://h?api_key=********&q=b&Token=********&x"),
            ("http://h/p?si%67=a%26b&token=&key=a=b", "http://h/p?si%67=********&token=&key=********"),
            ("http://h/s/0123456789abcdef0123456789/mcp?v=sk-live-1234", "http://h/s/********/mcp?v=********"),
            ("http://h/?a=@b:c", "http://h/?a=@b:c"),
            ("not a url", "not a url"),
        ] {
            let parts: Vec<_> = secret_spots(url).into_iter().map(|(_, range)| range).collect();
            assert_eq!(without(url, &parts), masked);
        }
        assert_eq!(decoded("a%20b%2a%"), "a b*%");
    }

    #[test]
    fn arguments_hide_what_is_clearly_secret() {
        for (args, masked) in [
            (vec!["--api-key", "abc", "-y"], vec!["--api-key", "********", "-y"]),
            (vec!["--token=abc", "--port=80"], vec!["--token=********", "--port=80"]),
            (vec!["--token", "--verbose"], vec!["--token", "--verbose"]),
            (vec!["-e", "API_KEY=abc", "DEBUG=1"], vec!["-e", "API_KEY=********", "DEBUG=1"]),
            (vec!["--header", "Authorization: Bearer abc"], vec!["--header", "Authorization: Bearer ********"]),
            (vec!["--header=X-Api-Key:abc"], vec!["--header=X-Api-Key:********"]),
            (vec!["https://u:p@h/?key=k", "x"], vec!["https://u:********@h/?key=********", "x"]),
            (vec!["--db=mysql://u:p@h/d"], vec!["--db=mysql://u:********@h/d"]),
            (vec!["sk-ant-abc123"], vec!["********"]),
            (
                vec!["-c", "curl -H 'x: sk-ant-abc123' && X_TOKEN=abc run"],
                vec!["-c", "curl -H 'x: ********' && X_TOKEN=******** run"],
            ),
            (vec!["--config", r#"{"apiKey": "abc!", "n":1}"#], vec!["--config", r#"{"apiKey": "********", "n":1}"#]),
            (vec!["serve --token abc -y"], vec!["serve --token ******** -y"]),
            (
                vec!["-c", "curl -H 'Authorization: Bearer abc' x"],
                vec!["-c", "curl -H 'Authorization: Bearer ********' x"],
            ),
            (vec!["c2VjcmV0IDEyMzQ1Njc4OTAxMjM0NTY3OA=="], vec!["********"]),
            (
                vec!["-y", "@scope/server@1.0.0", "/data", "a=b", "", "stdio", "-c", "echo 'no key' >&2; exit 3"],
                vec!["-y", "@scope/server@1.0.0", "/data", "a=b", "", "stdio", "-c", "echo 'no key' >&2; exit 3"],
            ),
        ] {
            assert_eq!(shown(&args), masked);
        }
    }

    #[test]
    fn what_a_server_says_is_shown_without_its_secrets() {
        let remote = Remote {
            server_url: "https://user:p%40ss@host/mcp?key=k-value".to_owned(),
            auth_header: None,
            auth_token: Some("Bearer token-value".to_owned().into()),
            custom_headers: Some([("x".to_owned(), "header-value".to_owned().into())].into()),
            oauth: None,
        };
        let secrets = of(&Connector::Sse(remote));
        let said = "token-value, header-value, k-value, p@ss, p%40ss and dXNlcjpwQHNz of user at host";
        let shown = "********, ********, ********, ********, ******** and ******** of user at host";
        assert_eq!(scrub(said, &secrets), shown);
        let stdio = Stdio {
            command: "c".to_owned(),
            args: ["--token", "arg-value", "plain"].map(str::to_owned).into(),
            env: Some([("ANY".to_owned(), "env-value".to_owned().into())].into()),
        };
        assert_eq!(scrub("arg-value env-value plain", &of(&Connector::Stdio(stdio))), "******** ******** plain");
    }
}
