//! Masks in place of secrets, in what goes out, and what a mask means that comes back (CONTRACT row 6).
//!
//! A mask means: as it is stored. It stands for the value of the same header, variable, parameter or argument, and only on
//! the same origin: whoever may not read a secret must not be able to have it sent elsewhere.

use url::Url;

use crate::mcp::{bare, hidden_parts};
use crate::model::{Connector, OauthClient, Remote, Secret, SecretMap, Stdio};
use crate::secrets::{MASK, decoded, is_secret_variable, secret_args, secret_spots, spots, without, without_scheme};

/// What a connection is shown as.
pub fn masked(connector: &Connector) -> Connector {
    match connector {
        Connector::Stdio(stdio) => Connector::Stdio(masked_stdio(stdio)),
        Connector::Sse(remote) => Connector::Sse(masked_remote(remote)),
        Connector::StreamableHttp(remote) => Connector::StreamableHttp(masked_remote(remote)),
    }
}

fn masked_stdio(Stdio { command, args, env }: &Stdio) -> Stdio {
    let env = env.as_ref().map(|env| {
        let shown = |name: &str, value: &Secret| {
            let text = value.expose();
            let is_secret = is_secret_variable(name, text) || !hidden_parts(text, Vec::new()).is_empty();
            if is_secret { masked_value(value) } else { value.clone() }
        };
        env.iter().map(|(name, value)| (name.clone(), shown(name, value))).collect()
    });
    Stdio { command: command.clone(), args: masked_args(args), env }
}

fn masked_remote(Remote { server_url, auth_header, auth_token, custom_headers, oauth }: &Remote) -> Remote {
    let headers =
        |headers: &SecretMap| headers.iter().map(|(name, value)| (name.clone(), masked_value(value))).collect();
    Remote {
        server_url: masked_url(server_url),
        auth_header: auth_header.clone(),
        auth_token: auth_token.as_ref().map(masked_value),
        custom_headers: custom_headers.as_ref().map(headers),
        oauth: oauth.as_ref().map(|client| OauthClient {
            client_secret: client.client_secret.as_ref().map(masked_value),
            ..client.clone()
        }),
    }
}

/// A template alone is no secret: its variable says where the secret comes from.
fn masked_value(value: &Secret) -> Secret {
    let value = value.expose();
    let secret = without_scheme(value);
    let is_none = secret.is_empty() || bare(secret).is_some();
    let shown = if is_none { value.to_owned() } else { value[..value.len() - secret.len()].to_owned() + MASK };
    shown.into()
}

/// A URL without what is secret in it.
pub fn masked_url(url: &str) -> String {
    let parts: Vec<_> = secret_spots(url).into_iter().map(|(_, range)| range).collect();
    without(url, &parts)
}

fn masked_args(args: &[String]) -> Vec<String> {
    args.iter().zip(secret_args(args)).map(|(arg, parts)| without(arg, &hidden_parts(arg, parts))).collect()
}

/// Whether a value is a mask, with or without `Bearer ` before it.
pub fn is_mask(value: &Secret) -> bool {
    without_scheme(value.expose()) == MASK
}

/// Whether a mask stands somewhere in a URL.
pub fn is_masked_url(url: &str) -> bool {
    spots(url).into_iter().any(|(_, range)| decoded(&url[range]) == MASK)
}

/// Whether a mask stands in an argument: eight asterisks that are not part of more.
pub fn is_masked_arg(arg: &str) -> bool {
    let mut runs = arg.split(|character| character != '*');
    runs.any(|run| run == MASK)
}

/// Whether both URLs have the same scheme, host and port: what is secret at the one may go to the other.
pub fn same_origin(one: &str, other: &str) -> bool {
    let origin = |url| Url::parse(url).ok().map(|url| url.origin());
    origin(one).is_some_and(|one| origin(other) == Some(one))
}

/// The value that a mask stands for; `None` when it does not stand for this one.
pub fn unmasked_value(mask: &Secret, stored: &Secret) -> Option<Secret> {
    (mask.expose() == MASK || mask.expose().eq_ignore_ascii_case(masked_value(stored).expose())).then(|| stored.clone())
}

/// A URL with what its masks stand for in `stored`; `None` when one of them stands for nothing there.
pub fn unmasked_url(url: &str, stored: &str) -> Option<String> {
    let theirs = spots(stored);
    let mut unmasked = url.to_owned();
    let masks = spots(url).into_iter().filter(|(_, range)| decoded(&url[range.clone()]) == MASK);
    // From the end, so that the places before stay where they are.
    for (spot, range) in masks.collect::<Vec<_>>().into_iter().rev() {
        let (_, value) = theirs.iter().find(|(other, _)| *other == spot)?;
        unmasked.replace_range(range, &stored[value.clone()]);
    }
    Some(unmasked)
}

/// Arguments with what their masks stand for among `stored`, and the numbers of those that stand for nothing. An argument
/// may have moved, together with the flag before it.
pub fn unmasked_args(args: Vec<String>, stored: &[String]) -> (Vec<String>, Vec<usize>) {
    let shown = masked_args(stored);
    let mut taken = vec![false; stored.len()];
    let mut lost = Vec::new();
    let before = |list: &[String], place: usize| place.checked_sub(1).map(|place| list[place].clone());
    let unmasked = args.iter().enumerate().map(|(place, arg)| {
        if !is_masked_arg(arg) {
            return arg.clone();
        }
        let same = |other: &usize| !taken[*other] && shown[*other] == *arg;
        let in_place = |other: &usize| same(other) && before(&shown, *other) == before(&args, place);
        // A mask alone says nothing of what it stands for; one behind a name does.
        let found = Some(place)
            .filter(|other| *other < stored.len() && in_place(other))
            .or_else(|| (0..stored.len()).find(in_place))
            .or_else(|| (0..stored.len()).find(same).filter(|_| arg != MASK));
        match found {
            Some(other) => {
                taken[other] = true;
                stored[other].clone()
            }
            None => {
                lost.push(place);
                arg.clone()
            }
        }
    });
    let unmasked = unmasked.collect();
    (unmasked, lost)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_url_comes_back_as_it_was() {
        for url in [
            "https://host/mcp",
            "https://user:pa:ss@w@host:1/mcp?api_key=a%26b&q=1&key=2&key=3",
            "http://h/s/0123456789abcdef0123456789/mcp?token=",
        ] {
            assert_eq!(unmasked_url(&masked_url(url), url).unwrap(), url);
        }
        let stored = "https://u:pw@h/mcp?key=one&key=two";
        let unmasked = |url| unmasked_url(url, stored);
        assert_eq!(
            unmasked("https://u:********@h/other?key=new&key=********").unwrap(),
            "https://u:pw@h/other?key=new&key=two"
        );
        assert_eq!(unmasked("https://h/?a=1&key=%2A%2A%2A%2A%2A%2A%2A%2A").unwrap(), "https://h/?a=1&key=one");
        assert_eq!(unmasked("https://h/?token=********"), None);
        assert_eq!(unmasked("https://********@h/").as_deref(), Some("https://u@h/"), "the name before the password");
        assert!(is_masked_url("https://u:********@h/") && !is_masked_url(stored));
    }

    #[test]
    fn a_mask_stands_for_a_value_of_its_form() {
        let stored = |text: &str| Secret::from(text.to_owned());
        for (mask, value, found) in [
            ("********", "abc", true),
            ("********", "Bearer abc", true),
            ("Bearer ********", "Bearer abc", true),
            ("bearer ********", "Bearer abc", true),
            ("Bearer ********", "abc", false),
        ] {
            let (mask, value) = (stored(mask), stored(value));
            assert!(is_mask(&mask));
            assert_eq!(unmasked_value(&mask, &value), found.then_some(value), "{mask:?}");
        }
        for text in ["", "*******", "*********", "Token ********", "Bearer abc"] {
            assert!(!is_mask(&stored(text)), "{text}");
        }
    }

    #[test]
    fn a_template_is_shown_and_a_secret_default_is_not() {
        let value = |text: &str| masked_value(&text.to_owned().into()).expose().to_owned();
        for text in ["{{ TOKEN }}", "{{TOKEN}}", "Bearer {{ TOKEN }}", "bearer {{TOKEN}}"] {
            assert_eq!(value(text), text);
        }
        for text in ["{{ TOKEN | abc }}", "Basic {{ TOKEN }}", "{{ TOKEN }}{{ TOKEN }}", "{{ token }}", " {{ TOKEN }}"]
        {
            assert_eq!(value(text), MASK, "{text}");
        }
        assert_eq!(value("Bearer {{ TOKEN | abc }}"), "Bearer ********");
        let given = texts(&[
            "--token={{ TOKEN }}",
            "--token={{ OTHER | abc }}",
            "--token=abc{{ TOKEN }}",
            "--api-key",
            "{{ MINE }}",
            "{{ API_KEY | abc }}",
            "{{ REGION | eu }}",
            "{{ REGION | ghp_16C7e42F292c6912E77 }}/{{ API_KEY }}",
            "-H Authorization: Bearer {{ TOKEN | abc }}",
            "--header=Authorization: Bearer {{ TOKEN }}",
        ]);
        let shown = texts(&[
            "--token={{ TOKEN }}",
            "--token={{ OTHER | ******** }}",
            "--token=********",
            "--api-key",
            "{{ MINE }}",
            "{{ API_KEY | ******** }}",
            "{{ REGION | eu }}",
            "{{ REGION | ******** }}/{{ API_KEY }}",
            "-H Authorization: Bearer {{ TOKEN | ******** }}",
            "--header=Authorization: Bearer {{ TOKEN }}",
        ]);
        assert_eq!(masked_args(&given), shown);
        assert_eq!(unmasked_args(shown, &given), (given, vec![]));
        let env =
            [("API_KEY", "{{ MINE }}"), ("B_KEY", "{{ MINE | abc }}"), ("C", "{{ PASS | abc }}"), ("D", "{{ E | f }}")];
        let env = env.map(|(name, text)| (name.to_owned(), text.to_owned().into())).into();
        let masked = masked_stdio(&Stdio { command: "c".to_owned(), args: vec![], env: Some(env) }).env.unwrap();
        let masked: Vec<_> = masked.values().map(Secret::expose).collect();
        assert_eq!(masked, ["{{ MINE }}", MASK, MASK, "{{ E | f }}"]);
    }

    #[test]
    fn arguments_come_back_as_they_were_also_when_they_moved() {
        let stored = texts(&["-y", "--api-key", "one", "--token=two", "--api-key", "three", "https://u:p@h", "run"]);
        let shown = masked_args(&stored);
        assert_eq!(shown[2], MASK);
        assert_eq!(unmasked_args(shown, &stored), (stored.clone(), vec![]));
        let moved = texts(&["--token=********", "-v", "--api-key", "********", "https://u:********@h"]);
        let (unmasked, lost) = unmasked_args(moved, &stored);
        assert_eq!((unmasked, lost), (texts(&["--token=two", "-v", "--api-key", "one", "https://u:p@h"]), vec![]));
        let strange = texts(&["--other", "********", "--key=********", "a ********* b", "********"]);
        assert_eq!(unmasked_args(strange, &stored).1, [1, 2, 4]);
        assert_eq!(unmasked_args(texts(&["********"]), &[]).1, [0]);
    }
}
