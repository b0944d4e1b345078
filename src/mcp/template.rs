//! `{{ VARIABLE | default }}` in the token, the header values, the arguments and the environment of a server (CONTRACT
//! row 17), in Letta's grammar: `\{\{\s*([A-Z_][A-Z0-9_]*)\s*(?:\|\s*([^}]+?)\s*)?\}\}`. What does not match is a literal,
//! and so is what a value brings. Nothing here knows where values come from; all of it takes linear time.

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::model::{Connector, Remote, Secret, SecretMap, Stdio};
use crate::secrets;

use super::Error;
use super::fields::{Place, faults};

/// The longest text that may come of one, in bytes: as long as one that is given without templates.
const MAX_TEXT: usize = 32 * 1024;

/// One template in a text.
#[derive(Debug, PartialEq, Eq)]
pub struct Template<'a> {
    pub range: Range<usize>,
    pub name: &'a str,
    /// Where its default stands.
    pub default: Option<Range<usize>>,
}

/// The templates of a text, in order.
pub fn templates(text: &str) -> Templates<'_> {
    Templates { text, from: 0, brace: 0 }
}

pub fn is_templated(text: &str) -> bool {
    templates(text).next().is_some()
}

/// The variable of a text that is one template without a default, and nothing else.
pub fn bare(text: &str) -> Option<&str> {
    let template = templates(text).next()?;
    (template.range == (0..text.len()) && template.default.is_none()).then_some(template.name)
}

/// The secret parts of a text with templates, of which `parts` are secret without a thought of these. In a secret place a
/// template hides its default; so it does when its variable has a secret name, or its default looks like a secret.
pub fn hidden_parts(text: &str, mut parts: Vec<Range<usize>>) -> Vec<Range<usize>> {
    for template in templates(text) {
        let range = template.range;
        let before = parts.len();
        parts.retain(|part| part.start < range.start || part.end > range.end);
        let was_secret = parts.len() < before;
        let Some(default) = template.default else { continue };
        let is_covered = parts.iter().any(|part| part.start <= default.start && default.end <= part.end);
        let looks_secret =
            secrets::is_secret_name(template.name) || !secrets::secret_parts(&text[default.clone()]).is_empty();
        if !is_covered && (was_secret || looks_secret) {
            parts.push(default);
        }
    }
    parts.sort_by_key(|part| part.start);
    parts
}

pub struct Templates<'a> {
    text: &'a str,
    from: usize,
    /// Where the next `}` is, as far as somebody has looked: looked for again and again, it would take quadratic time.
    brace: usize,
}

impl<'a> Iterator for Templates<'a> {
    type Item = Template<'a>;

    fn next(&mut self) -> Option<Template<'a>> {
        while let Some(found) = self.text[self.from..].find("{{") {
            let start = self.from + found;
            if let Some(template) = self.read(start) {
                self.from = template.range.end;
                return Some(template);
            }
            self.from = start + 1;
        }
        self.from = self.text.len();
        None
    }
}

impl<'a> Templates<'a> {
    fn read(&mut self, start: usize) -> Option<Template<'a>> {
        let text = self.text;
        let name_start = after_space(text, start + 2);
        let length = text[name_start..].bytes().take_while(|byte| is_of_a_name(*byte)).count();
        let name = &text[name_start..name_start + length];
        if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
            return None;
        }
        let after = after_space(text, name_start + length);
        match text.as_bytes().get(after)? {
            b'}' => {
                let whole = text[after..].starts_with("}}");
                whole.then(|| Template { range: start..after + 2, name, default: None })
            }
            b'|' => {
                let end = self.next_brace(after + 1)?;
                let given = &text[after + 1..end];
                // One character at least, be it the last of the white space.
                let last = given.chars().next_back()?.len_utf8();
                let default = match given.trim() {
                    "" => end - last..end,
                    trimmed => {
                        let from = after + 1 + (given.len() - given.trim_start().len());
                        from..from + trimmed.len()
                    }
                };
                let whole = text[end..].starts_with("}}");
                whole.then(|| Template { range: start..end + 2, name, default: Some(default) })
            }
            _ => None,
        }
    }

    fn next_brace(&mut self, from: usize) -> Option<usize> {
        if self.brace < from {
            self.brace = self.text[from..].find('}').map_or(self.text.len(), |found| from + found);
        }
        (self.brace < self.text.len()).then_some(self.brace)
    }
}

fn after_space(text: &str, from: usize) -> usize {
    text.len() - text[from..].trim_start().len()
}

fn is_of_a_name(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_'
}

/// Whether a text is the name of a variable.
pub fn is_name(text: &str) -> bool {
    text.bytes().all(is_of_a_name) && text.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

/// Why a text cannot be filled in.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfilled<'a> {
    /// The variable has neither a value nor, there, a default.
    NoValue(&'a str),
    TooLong,
}

/// A text with values, or defaults, in place of its templates.
pub fn expand<'a, 'v>(text: &'a str, value: impl Fn(&str) -> Option<&'v str>) -> Result<String, Unfilled<'a>> {
    let mut filled = String::new();
    let mut add = |piece: &str| {
        filled.push_str(piece);
        if filled.len() > MAX_TEXT { Err(Unfilled::TooLong) } else { Ok(()) }
    };
    let mut from = 0;
    for Template { range, name, default } in templates(text) {
        add(&text[from..range.start])?;
        let default = default.map(|default| &text[default]);
        let value: Option<&str> = value(name);
        add(value.or(default).ok_or(Unfilled::NoValue(name))?)?;
        from = range.end;
    }
    add(&text[from..])?;
    Ok(filled)
}

/// The variables in the templates of a configuration, and whether each has a default wherever it stands.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs(BTreeMap<String, bool>);

impl Needs {
    pub fn of(connector: &Connector) -> Self {
        let mut needs: BTreeMap<String, bool> = BTreeMap::new();
        for text in texts(connector) {
            for template in templates(text) {
                *needs.entry(template.name.to_owned()).or_insert(true) &= template.default.is_some();
            }
        }
        Self(needs)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Every text of a configuration that may have templates.
fn texts(connector: &Connector) -> Vec<&str> {
    match connector {
        Connector::Stdio(Stdio { args, env, .. }) => {
            let env = env.iter().flatten().map(|(_, value)| value.expose());
            args.iter().map(String::as_str).chain(env).collect()
        }
        Connector::Sse(remote) | Connector::StreamableHttp(remote) => {
            let headers = remote.custom_headers.iter().flatten().map(|(_, value)| value.expose());
            remote.auth_token.iter().map(Secret::expose).chain(headers).collect()
        }
    }
}

/// Stands for a set of values, in this process alone; nobody can find them from it.
pub type Mark = [u8; 32];

/// The values for the templates of one configuration.
#[derive(Clone, Default)]
pub struct Filling {
    values: BTreeMap<String, Secret>,
    /// Those that would be there without the request's.
    standing: BTreeMap<String, Secret>,
    /// Some came with a request: what is opened with them is for requests with the same values alone.
    pub is_own: bool,
    /// The same for the same values; `None` without templates.
    pub mark: Option<Mark>,
}

impl Filling {
    /// The values for `needs`: the request's before those that stand. `key` is this process's own.
    ///
    /// # Errors
    /// [`Error::NoValue`].
    pub fn choose<'a>(
        needs: &Needs,
        request: impl Fn(&str) -> Option<&'a Secret>,
        standing: impl Fn(&str) -> Option<&'a Secret>,
        key: &[u8],
    ) -> Result<Self, Error> {
        if needs.is_empty() {
            return Ok(Self::default());
        }
        let mut filling = Self::default();
        let mut hash = Sha256::new();
        hash.update(key);
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        };
        for (name, has_default) in &needs.0 {
            let (given, stands) = (request(name), standing(name));
            filling.is_own |= given.is_some();
            if let Some(stands) = stands {
                filling.standing.insert(name.clone(), stands.clone());
            }
            match given.or(stands) {
                Some(value) => {
                    part(name);
                    part(value.expose());
                    filling.values.insert(name.clone(), value.clone());
                }
                None if *has_default => {}
                None => return Err(Error::NoValue { name: shown(name) }),
            }
        }
        filling.mark = Some(hash.finalize().into());
        Ok(filling)
    }
}

/// A name as errors show it.
fn shown(name: &str) -> String {
    const LONGEST: usize = 100;
    if name.len() <= LONGEST { name.to_owned() } else { format!("{}…", &name[..LONGEST]) }
}

/// A configuration whose templates are filled in, and what must be known of that.
pub struct Filled {
    pub connector: Connector,
    /// By its number, whether an argument had templates: it stays one argument, whatever the values hold.
    whole: Vec<bool>,
    /// The command as the stored configuration names it, without the request's values: it reaches the files named in
    /// there, and none that a request names. `None` when it is the same.
    pub named: Option<Stdio>,
    /// What no error may show.
    pub secrets: Vec<Secret>,
}

/// The command of a [`Filled`].
#[derive(Clone, Copy)]
pub struct FilledStdio<'a> {
    pub config: &'a Stdio,
    pub filled: &'a Filled,
}

impl Filled {
    /// Fills templates in, and looks at what came of it as at what is written (CONTRACT rows 2 and 7).
    ///
    /// # Errors
    /// [`Error::BadValue`], [`Error::NoValue`].
    pub fn new(connector: &Connector, filling: &Filling) -> Result<Self, Error> {
        let mut secrets: Vec<Secret> = filling.values.values().cloned().collect();
        if filling.mark.is_none() {
            secrets.extend(secrets::of(connector));
            return Ok(Self { connector: connector.clone(), whole: Vec::new(), named: None, secrets });
        }
        let value = |name: &str| filling.values.get(name).map(Secret::expose);
        let (mut whole, mut named) = (Vec::new(), None);
        let filled = match connector {
            Connector::Stdio(stdio) => {
                whole = stdio.args.iter().map(|arg| is_templated(arg)).collect();
                named = Some(standing(stdio, filling));
                Connector::Stdio(fill_stdio(stdio, value)?)
            }
            Connector::Sse(remote) => Connector::Sse(fill_remote(remote, value)?),
            Connector::StreamableHttp(remote) => Connector::StreamableHttp(fill_remote(remote, value)?),
        };
        secrets.extend(secrets::of(&filled));
        secrets.extend(hidden_defaults(connector));
        Ok(Self { connector: filled, whole, named, secrets })
    }

    /// Whether an argument, by its number, had templates.
    pub fn was_templated(&self, arg: usize) -> bool {
        self.whole.get(arg).copied().unwrap_or(false)
    }
}

/// What answers mask of the arguments: filled in, it may look like no secret any more. All of a variable or a header is
/// secret anyway.
fn hidden_defaults(connector: &Connector) -> Vec<Secret> {
    let Connector::Stdio(Stdio { args, .. }) = connector else { return Vec::new() };
    let parts = args.iter().zip(secrets::secret_args(args)).map(|(arg, parts)| (arg, hidden_parts(arg, parts)));
    parts.flat_map(|(arg, parts)| parts.into_iter().map(|part| arg[part].to_owned().into())).collect()
}

fn fill_stdio<'a>(stdio: &'a Stdio, value: impl Fn(&str) -> Option<&'a str>) -> Result<Stdio, Error> {
    let fill = |text: &'a str, place: &dyn Fn() -> String| -> Result<String, Error> {
        let filled = filled(text, &value, place)?;
        // A text of the system ends there.
        if filled.contains('\0') { Err(Error::BadValue { place: place() }) } else { Ok(filled) }
    };
    let args = stdio.args.iter().enumerate();
    let args = args.map(|(number, arg)| fill(arg, &|| format!("argument {}", number + 1))).collect::<Result<_, _>>()?;
    let env = |env: &'a SecretMap| -> Result<SecretMap, Error> {
        let fill = |(name, text): (&'a String, &'a Secret)| {
            let place = || format!("the environment variable {}", shown_key(name));
            Ok((name.clone(), fill(text.expose(), &place)?.into()))
        };
        env.iter().map(fill).collect()
    };
    Ok(Stdio { command: stdio.command.clone(), args, env: stdio.env.as_ref().map(env).transpose()? })
}

fn fill_remote<'a>(remote: &'a Remote, value: impl Fn(&str) -> Option<&'a str>) -> Result<Remote, Error> {
    let token = |token: &'a Secret| filled(token.expose(), &value, &|| "auth_token".to_owned()).map(Secret::from);
    let headers = |headers: &'a SecretMap| -> Result<SecretMap, Error> {
        let fill = |(name, text): (&'a String, &'a Secret)| {
            Ok((name.clone(), filled(text.expose(), &value, &|| of_header(name))?.into()))
        };
        headers.iter().map(fill).collect()
    };
    let remote = Remote {
        auth_token: remote.auth_token.as_ref().map(token).transpose()?,
        custom_headers: remote.custom_headers.as_ref().map(headers).transpose()?,
        ..remote.clone()
    };
    // What does not come of a value was there before, and no reason not to send it.
    let place = match faults(&remote).into_iter().find(|(place, _)| *place != Place::Oauth) {
        None | Some((Place::Oauth, _)) => None,
        Some((Place::AuthHeader, _)) => Some("auth_header".to_owned()),
        Some((Place::AuthToken, _)) => Some("auth_token".to_owned()),
        Some((Place::CustomHeaders, _)) => Some("all headers together".to_owned()),
        Some((Place::CustomHeader(name), _)) => Some(of_header(name)),
    };
    match place {
        Some(place) => Err(Error::BadValue { place }),
        None => Ok(remote),
    }
}

fn filled<'a>(
    text: &'a str,
    value: &impl Fn(&str) -> Option<&'a str>,
    place: &dyn Fn() -> String,
) -> Result<String, Error> {
    expand(text, value).map_err(|unfilled| match unfilled {
        Unfilled::NoValue(name) => Error::NoValue { name: shown(name) },
        Unfilled::TooLong => Error::BadValue { place: place() },
    })
}

fn of_header(name: &str) -> String {
    format!("the header {}", shown_key(name))
}

/// A key of the configuration as errors show it.
fn shown_key(key: &str) -> String {
    key.chars().take(64).flat_map(char::escape_debug).collect()
}

/// A command with the values that stand, and nothing in place of a text that cannot be had so.
fn standing(stdio: &Stdio, filling: &Filling) -> Stdio {
    let value = |name: &str| filling.standing.get(name).map(Secret::expose);
    let stands = |text: &str| expand(text, value).unwrap_or_default();
    Stdio {
        command: stdio.command.clone(),
        args: stdio.args.iter().map(|arg| stands(arg)).collect(),
        env: stdio
            .env
            .as_ref()
            .map(|env| env.iter().map(|(name, text)| (name.clone(), stands(text.expose()).into())).collect()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(&str, &str, Option<&str>)> {
        let read = templates(text).map(|one| (&text[one.range], one.name, one.default.map(|default| &text[default])));
        read.collect()
    }

    #[test]
    fn the_grammar_is_lettas() {
        for (text, found) in [
            ("{{ A }}", ("{{ A }}", "A", None)),
            ("{{A}}", ("{{A}}", "A", None)),
            ("x{{\t_A9\n}}y", ("{{\t_A9\n}}", "_A9", None)),
            ("{{ A | b c }}", ("{{ A | b c }}", "A", Some("b c"))),
            ("{{A|b}}", ("{{A|b}}", "A", Some("b"))),
            ("{{ A | {b| }}", ("{{ A | {b| }}", "A", Some("{b|"))),
            ("{{ A | }}", ("{{ A | }}", "A", Some(" "))),
            ("{{ A |\t\n}}", ("{{ A |\t\n}}", "A", Some("\n"))),
            ("{{ A | é }}", ("{{ A | é }}", "A", Some("é"))),
            ("{{{ A }}}", ("{{ A }}", "A", None)),
            ("{{ {{ A }}", ("{{ A }}", "A", None)),
            ("{{ A | {{ B }}", ("{{ A | {{ B }}", "A", Some("{{ B"))),
            ("{{ A } {{ B }}", ("{{ B }}", "B", None)),
        ] {
            assert_eq!(read(text), [found], "{text}");
        }
        for text in [
            "",
            "{{}}",
            "{{ a }}",
            "{{ Ab }}",
            "{{ 9A }}",
            "{{ A",
            "{{ A }",
            "{ A }",
            "{{ A|}}",
            "{{ A B }}",
            "{{ A | b }",
        ] {
            assert_eq!(read(text), [], "{text}");
        }
        assert_eq!(read("{{ A }}{{B|1}} {{C}").iter().map(|one| one.1).collect::<Vec<_>>(), ["A", "B"]);
    }

    #[test]
    fn values_come_before_defaults_and_are_not_read_again() {
        let value = |name: &str| match name {
            "A" => Some("{{ B }}"),
            "EMPTY" => Some(""),
            _ => None,
        };
        assert_eq!(expand("<{{ A }}|{{ A | x }}|{{ C | y }}|{{EMPTY|z}}>", value).unwrap(), "<{{ B }}|{{ B }}|y|>");
        assert_eq!(expand("{{ a }} { A }", value).unwrap(), "{{ a }} { A }");
        assert_eq!(expand("{{ C | y }}{{ C }}", value), Err(Unfilled::NoValue("C")));
    }

    #[test]
    fn what_comes_of_a_text_is_bounded() {
        let value = "v".repeat(1024);
        let times = |count: usize| "{{V}}".repeat(count);
        let length = |text: &str| expand(text, |_| Some(&*value)).ok().map(|filled| filled.len());
        assert_eq!(length(&times(32)), Some(MAX_TEXT));
        assert_eq!(length(&(times(32) + "x")), None);
        assert_eq!(expand(&"x".repeat(MAX_TEXT + 1), |_| None), Err(Unfilled::TooLong));
    }

    /// A text of a mebibyte that looks for the end of a template at every step: in quadratic time it would take hours.
    #[test]
    fn no_text_takes_long() {
        for piece in ["{{A|", "{{A", "{{ ", "{", "{{A|{{A| }", "{{A |"] {
            let text = piece.repeat((1 << 20) / piece.len());
            assert!(templates(&text).count() <= text.len());
        }
    }

    fn needs(text: &str) -> Needs {
        Needs::of(&stdio(&[text], &[]))
    }

    fn stdio(args: &[&str], env: &[(&str, &str)]) -> Connector {
        let env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned().into())).collect();
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Connector::Stdio(Stdio { command: "{{ A }}".to_owned(), args, env: Some(env) })
    }

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn filling(needs: &Needs, request: Pairs<'_>, standing: Pairs<'_>, key: u8) -> Result<Filling, Error> {
        let map = |pairs: Pairs<'_>| -> SecretMap {
            pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned().into())).collect()
        };
        let (request, standing) = (map(request), map(standing));
        Filling::choose(needs, |name| request.get(name), |name| standing.get(name), &[key])
    }

    #[test]
    fn the_mark_is_that_of_the_values_that_are_used() {
        let needs = needs("{{ A | x }} {{ B | x }}");
        let mark = |request: Pairs<'_>, standing: Pairs<'_>| {
            let filling = filling(&needs, request, standing, 0).unwrap();
            (filling.is_own, filling.mark.unwrap())
        };
        let none = mark(&[], &[]);
        assert_eq!(mark(&[("C", "1")], &[("D", "1")]), none, "others are not used");
        assert!(!none.0 && !mark(&[], &[("A", "1")]).0 && mark(&[("A", "1")], &[]).0);
        assert_eq!(mark(&[("A", "1")], &[("A", "2")]), mark(&[("A", "1")], &[]), "the request's come first");
        let different = [
            none.1,
            mark(&[("A", "1")], &[]).1,
            mark(&[("B", "1")], &[]).1,
            mark(&[("A", "1"), ("B", "1")], &[]).1,
            mark(&[("A", "")], &[]).1,
            mark(&[("A", ""), ("B", "")], &[]).1,
            mark(&[("A", "1B")], &[]).1,
            filling(&needs, &[("A", "1")], &[], 1).unwrap().mark.unwrap(),
        ];
        for (place, one) in different.iter().enumerate() {
            assert!(!different[place + 1..].contains(one), "{place}");
        }
        assert!(filling(&Needs::default(), &[("A", "1")], &[], 0).unwrap().mark.is_none());
    }

    #[test]
    fn a_variable_without_a_value_is_named() {
        let needs = needs("{{ A }} {{ A | x }}");
        let Err(Error::NoValue { name }) = filling(&needs, &[("B", "1")], &[], 0) else { panic!("it has no value") };
        assert_eq!(name, "A");
        assert!(filling(&needs, &[("A", "")], &[], 0).is_ok(), "an empty value is one");
        let long = Needs::of(&stdio(&[&format!("{{{{ {} }}}}", "A".repeat(30_000))], &[]));
        assert!(filling(&long, &[], &[], 0).err().unwrap().to_string().len() < 500);
    }

    #[test]
    fn a_value_makes_no_argument_and_names_no_file() {
        let connector = stdio(
            &["--dir={{ DIR }}", "{{ NAME | /srv/a }}", "plain arg", "{{ FILE }}"],
            &[("TOKEN", "{{ TOKEN }}"), ("HOME_OF", "/srv/x")],
        );
        let request: Pairs<'_> =
            &[("DIR", "/home/me -v"), ("NAME", "/home/you"), ("TOKEN", "a secret"), ("FILE", "/home/b")];
        let filling = filling(&Needs::of(&connector), request, &[("FILE", "/srv/file")], 0).unwrap();
        let filled = Filled::new(&connector, &filling).unwrap();
        let expected = stdio(
            &["--dir=/home/me -v", "/home/you", "plain arg", "/home/b"],
            &[("TOKEN", "a secret"), ("HOME_OF", "/srv/x")],
        );
        assert!(filled.connector == expected, "the command has no templates");
        let whole: Vec<_> = (0..5).map(|arg| filled.was_templated(arg)).collect();
        assert_eq!(whole, [true, true, false, true, false]);
        let named = filled.named.unwrap();
        assert_eq!(named.args, ["", "/srv/a", "plain arg", "/srv/file"]);
        assert_eq!(named.env.unwrap()["HOME_OF"].expose(), "/srv/x");
        assert!(filled.secrets.iter().any(|secret| secret.expose() == "/home/me -v"));
    }

    #[test]
    fn no_error_shows_a_default_that_answers_mask() {
        let connector = stdio(&["--as={{ DB_PASS | hunter22 }}", "{{ REGION | eu-west }}"], &[]);
        let filling = filling(&Needs::of(&connector), &[], &[], 0).unwrap();
        let filled = Filled::new(&connector, &filling).unwrap();
        let is_secret = |text: &str| filled.secrets.iter().any(|secret| secret.expose() == text);
        assert!(is_secret("hunter22") && !is_secret("eu-west"));
    }

    #[test]
    fn what_comes_of_values_is_checked_as_what_is_written() {
        let remote = |token: &str, headers: Pairs<'_>| {
            let headers = headers.iter().map(|&(name, value)| (name.to_owned(), value.to_owned().into())).collect();
            Connector::Sse(Remote {
                server_url: "http://127.0.0.1/{{ V }}".to_owned(),
                auth_header: None,
                auth_token: Some(token.to_owned().into()),
                custom_headers: Some(headers),
                oauth: None,
            })
        };
        let place = |connector: &Connector, value: &str| {
            let filling = filling(&Needs::of(connector), &[("V", value)], &[], 0).unwrap();
            match Filled::new(connector, &filling) {
                Ok(_) => None,
                Err(Error::BadValue { place }) => Some(place),
                Err(error) => panic!("{error}"),
            }
        };
        let (token, header) = (remote("Bearer {{ V }}", &[]), remote("t", &[("X-A", "{{ V }}")]));
        for bad in ["a\r\nX-Injected: 1", "a\nb", "é", "a ", "", "\u{7f}", &"a".repeat(32 * 1024)] {
            assert_eq!(place(&token, bad).as_deref(), Some("auth_token"), "{bad:.20}");
        }
        for bad in ["a\r\nX-Injected: 1", "a\nb", "é", "a ", " a", "\0", &"a".repeat(32 * 1024 + 1)] {
            assert_eq!(place(&header, bad).as_deref(), Some("the header X-A"), "{bad:.20}");
        }
        let many = remote("t", &[("X-A", "{{ V }}"), ("X-B", "{{ V }}"), ("X-C", "{{ V }}")]);
        assert_eq!(place(&many, &"a".repeat(30_000)).as_deref(), Some("all headers together"));
        for connector in [&token, &header, &many] {
            assert_eq!(place(connector, "fine"), None);
        }
        let command = stdio(&["a", "{{ V }}"], &[]);
        assert_eq!(place(&command, "a\0b").as_deref(), Some("argument 2"));
        assert_eq!(place(&stdio(&[], &[("K", "{{ V }}")]), "\0").as_deref(), Some("the environment variable K"));
        assert_eq!(place(&command, "a b\n\"é"), None);
    }
}
