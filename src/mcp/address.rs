//! What an address is, however it is written: pure functions that look nothing up and know no setting.
//!
//! [`server_url`] reads a URL, [`scope`] says of an IP address whether it is public, private, or none that Portolan
//! connects to, [`meant`] decodes the IPv4 address that an IPv6 one stands for. They hold for what is written in a
//! configuration and, through `egress`, for what names resolve to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::{Host, Url};

const MAX_URL_CHARS: usize = 2048;

/// Names of cloud metadata services, which give credentials of the machine to whoever asks. Their addresses are refused
/// as well; a name counts by itself where a cloud resolves it to some other address.
const METADATA_NAMES: [&str; 8] = [
    "api.metadata.cloud.ibm.com",
    "instance-data",
    "instance-data.ec2.internal",
    "metadata.azure.internal",
    "metadata.goog",
    "metadata.google.internal",
    "metadata.packet.net",
    "metadata.platformequinix.com",
];

/// Why an address may not be connected to; ends a sentence, and names no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    #[error("it is a link-local address")]
    LinkLocal,
    #[error("it is that of a cloud's metadata service")]
    Metadata,
    #[error("it is an unspecified address")]
    Unspecified,
    #[error("it is a multicast or broadcast address")]
    Multicast,
    #[error("it is in a range that is reserved and belongs to no server")]
    Reserved,
    #[error("it is an IPv6 address that stands for an IPv4 address which is not public")]
    Hidden,
    #[error("Portolan itself listens there")]
    Own,
    #[error("Portolan's database is there")]
    Database,
    #[error("--egress-deny names it")]
    Denied,
    #[error("it is not public, and --egress-allow does not name it")]
    NotPublic,
    #[error("it is not https, and --egress-allow does not name it")]
    NotHttps,
}

/// Where an address is that may be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Public,
    /// This machine or a network of its owner: loopback, RFC 1918, RFC 4193, RFC 6598 (also Tailscale's), and RFC 2544,
    /// from which some VPNs make up addresses for names.
    Private,
}

/// Where this address is.
///
/// # Errors
/// It is none to connect to for anybody: IANA's special-purpose registries (RFC 6890), and where clouds have their
/// metadata.
pub fn scope(address: IpAddr) -> Result<Scope, Forbidden> {
    match address {
        IpAddr::V4(address) => scope_v4(address),
        IpAddr::V6(address) => scope_v6(address),
    }
}

fn scope_v4(address: Ipv4Addr) -> Result<Scope, Forbidden> {
    match address.octets() {
        // Alibaba; Oracle; Azure's wire server. The others are link-local.
        [100, 100, 100, 200] | [192, 0, 0, 192] | [168, 63, 129, 16] | [169, 254, 169, 254] => Err(Forbidden::Metadata),
        [169, 254, ..] => Err(Forbidden::LinkLocal),
        [0, ..] => Err(Forbidden::Unspecified),
        [10 | 127, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18 | 19, ..] => {
            Ok(Scope::Private)
        }
        // IETF protocols, documentation (three networks), relays of 6to4.
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [192, 88, 99, _] => Err(Forbidden::Reserved),
        [224..=239, ..] | [255, 255, 255, 255] => Err(Forbidden::Multicast),
        [240..=255, ..] => Err(Forbidden::Reserved),
        _ => Ok(Scope::Public),
    }
}

fn scope_v6(address: Ipv6Addr) -> Result<Scope, Forbidden> {
    if let Some(address) = address.to_ipv4_mapped() {
        return scope_v4(address);
    }
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => return Err(Forbidden::Unspecified),
        [0, 0, 0, 0, 0, 0, 0, 1] => return Ok(Scope::Private),
        [0xfe80..=0xfebf, ..] => return Err(Forbidden::LinkLocal),
        [0xff00..=0xffff, ..] => return Err(Forbidden::Multicast),
        // Amazon; Google; Oracle; Scaleway.
        [0xfd00, 0xec2, ..]
        | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254]
        | [0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe]
        | [0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42] => return Err(Forbidden::Metadata),
        _ => {}
    }
    // A translator or tunnel sends these on as IPv4. For a public server that is how an IPv6-only network reaches it; to
    // anything else it is a way around the rules.
    let mut stands_for = embedded(address).peekable();
    if stands_for.peek().is_some() {
        return match stands_for.all(|inner| scope_v4(inner) == Ok(Scope::Public)) {
            true => Ok(Scope::Public),
            false => Err(Forbidden::Hidden),
        };
    }
    match address.segments() {
        [0xfc00..=0xfdff, ..] => Ok(Scope::Private),
        // IETF protocols, documentation (two networks).
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => Err(Forbidden::Reserved),
        [0x2000..=0x3fff, ..] => Ok(Scope::Public),
        _ => Err(Forbidden::Reserved),
    }
}

/// The IPv4 addresses inside an IPv6 one that is not just mapped.
fn embedded(address: Ipv6Addr) -> impl Iterator<Item = Ipv4Addr> {
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    let found = match address.segments() {
        // IPv4-compatible (RFC 4291 §2.5.5.1), NAT64 (RFC 6052), stateless translation (RFC 2765).
        [0, 0, 0, 0, 0, 0, a, b] | [0x64, 0xff9b, 0, 0, 0, 0, a, b] | [0, 0, 0, 0, 0xffff, 0, a, b] => [v4(a, b), None],
        // 6to4 (RFC 3056).
        [0x2002, a, b, ..] => [v4(a, b), None],
        // Teredo (RFC 4380): the server, and the client with its bits turned over.
        [0x2001, 0, a, b, _, _, c, d] => [v4(a, b), v4(!c, !d)],
        // ISATAP (RFC 5214), in any network.
        [_, _, _, _, 0 | 0x200, 0x5efe, a, b] => [v4(a, b), None],
        _ => [None, None],
    };
    found.into_iter().flatten()
}

/// The address that is meant by this one: the IPv4 address that an IPv6 one stands for, or itself.
pub fn meant(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => address,
        // The last of Teredo's two is the one that is reached.
        _ => v6.to_ipv4_mapped().or_else(|| embedded(v6).last()).map_or(address, IpAddr::V4),
    }
}

/// The host of a URL as an IP address.
pub fn literal(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(address) => Some(address.into()),
        Host::Ipv6(address) => Some(address.into()),
        Host::Domain(_) => None,
    }
}

/// A name without the dot that may end it.
pub fn plain(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether every resolver takes this for the same name (RFC 1123 §2.1, and underscores as containers have them).
fn is_name(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let mut labels = plain(name).split('.');
    name.len() <= 254 && labels.all(|label| (1..=63).contains(&label.len()) && label.bytes().all(is_letter))
}

/// Whether this host is one that nobody connects to.
fn check_host(url: &Url) -> Result<(), Forbidden> {
    if let Some(address) = literal(url) {
        return scope(address).map(drop);
    }
    let name = plain(url.host_str().unwrap_or_default());
    if METADATA_NAMES.contains(&name) { Err(Forbidden::Metadata) } else { Ok(()) }
}

/// What is wrong with a server's URL; each message is one sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("This must be an http or https URL with a host, of at most 2048 characters.")]
    Syntax,
    #[error("This URL can be read in more than one way; write its host and port plainly.")]
    Ambiguous,
    #[error("This address may not be connected to: {0}.")]
    Forbidden(#[from] Forbidden),
}

/// Reads the URL of a server, as it is to be used: `http` or `https`, in a spelling that every reader of URLs takes for
/// the same, to a host that may be connected to as far as its text tells. To be called when it is written and again when
/// a template in it was filled in.
///
/// # Errors
/// [`UrlError`]; what a name resolves to is found out when it is connected to.
pub fn server_url(text: &str) -> Result<Url, UrlError> {
    // The URL parser forgives white space, control characters and missing or extra slashes; the next one may not.
    let clean = text.chars().count() <= MAX_URL_CHARS
        && !text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\');
    let (scheme, rest) = text.split_once("://").filter(|_| clean).ok_or(UrlError::Syntax)?;
    let known = ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    let url = Url::parse(text).ok().filter(|url| known && !rest.starts_with('/') && url.fragment().is_none());
    let url = url.filter(Url::has_host).ok_or(UrlError::Syntax)?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = match authority.matches('@').count() {
        0 => authority,
        1 => authority.split_once('@').map_or(authority, |(_, host)| host),
        _ => return Err(UrlError::Ambiguous),
    };
    // Other letters are for names of other languages; those that turn into ASCII imitate a name or an address.
    let imitates = !host.is_ascii() && !url.host_str().is_some_and(|host| host.contains("xn--"));
    if host.contains('%') || imitates || !url.domain().is_none_or(is_name) || url.port() == Some(0) {
        return Err(UrlError::Ambiguous);
    }
    check_host(&url)?;
    Ok(url)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Scope, Forbidden> {
        scope(text.parse().unwrap())
    }

    #[test]
    fn every_range_has_its_scope_up_to_its_edges() {
        let table: [(&[&str], Result<Scope, Forbidden>); 9] = [
            (
                &[
                    "1.1.1.1",
                    "9.255.255.255",
                    "11.0.0.0",
                    "100.63.255.255",
                    "100.128.0.0",
                    "126.255.255.255",
                    "128.0.0.0",
                ],
                Ok(Scope::Public),
            ),
            (
                &[
                    "172.15.255.255",
                    "172.32.0.0",
                    "192.167.0.0",
                    "192.169.0.0",
                    "198.17.0.0",
                    "198.20.0.0",
                    "223.255.255.255",
                ],
                Ok(Scope::Public),
            ),
            (&["2000::", "2001:200::", "2606:4700::1111", "3ffe::1", "3fff:1000::"], Ok(Scope::Public)),
            (
                &[
                    "10.0.0.0",
                    "10.255.255.255",
                    "127.0.0.1",
                    "127.255.255.255",
                    "172.16.0.0",
                    "172.31.255.255",
                    "192.168.0.0",
                    "192.168.255.255",
                    "100.64.0.0",
                    "100.127.255.255",
                    "198.18.0.0",
                    "198.19.255.255",
                    "::1",
                    "fc00::",
                    "fdff::1",
                    "::ffff:10.0.0.1",
                    "::ffff:127.0.0.1",
                ],
                Ok(Scope::Private),
            ),
            (&["169.254.0.0", "169.254.255.255", "fe80::", "febf::1", "::ffff:169.254.1.1"], Err(Forbidden::LinkLocal)),
            (
                &[
                    "169.254.169.254",
                    "100.100.100.200",
                    "192.0.0.192",
                    "168.63.129.16",
                    "fd00:ec2::254",
                    "fd00:ec2::23",
                    "fd20:ce::254",
                    "fd00:c1::a9fe:a9fe",
                    "fd00:42::42",
                    "::ffff:169.254.169.254",
                    "::ffff:100.100.100.200",
                ],
                Err(Forbidden::Metadata),
            ),
            (&["0.0.0.0", "0.255.255.255", "::", "::ffff:0.0.0.0"], Err(Forbidden::Unspecified)),
            (&["224.0.0.0", "239.255.255.255", "255.255.255.255", "ff00::", "ff02::1"], Err(Forbidden::Multicast)),
            (
                &[
                    "192.0.0.1",
                    "192.0.2.1",
                    "198.51.100.1",
                    "203.0.113.1",
                    "192.88.99.1",
                    "240.0.0.0",
                    "255.255.255.254",
                    "2001:1::",
                    "2001:1ff::",
                    "2001:db8::1",
                    "3fff:fff::",
                    "100::1",
                    "4000::",
                    "5f00::",
                    "fec0::1",
                    "64:ff9b:1::1",
                    "1::",
                    "f000::",
                ],
                Err(Forbidden::Reserved),
            ),
        ];
        for (addresses, expected) in table {
            for address in addresses {
                assert_eq!(of(address), expected, "{address}");
            }
        }
    }

    /// All IPv6 addresses that stand for an IPv4 one.
    fn disguises(address: Ipv4Addr) -> Vec<Ipv6Addr> {
        let [a, b] = [u32::from(address) >> 16, u32::from(address) & 0xffff].map(|half| half as u16);
        [
            [0, 0, 0, 0, 0, 0, a, b],
            [0x64, 0xff9b, 0, 0, 0, 0, a, b],
            [0, 0, 0, 0, 0xffff, 0, a, b],
            [0x2002, a, b, 0, 0, 0, 0, 0],
            [0x2002, a, b, 7, 1, 2, 3, 4],
            [0x2001, 0, 0x808, 0x808, 0x8000, 63, !a, !b],
            [0x2001, 0, a, b, 0x8000, 63, !0x808, !0x808],
            [0x2001, 0x470, 1, 2, 0, 0x5efe, a, b],
            [0xfd00, 1, 1, 2, 0x200, 0x5efe, a, b],
        ]
        .map(Ipv6Addr::from)
        .to_vec()
    }

    #[test]
    fn no_disguise_leads_to_what_is_not_public() {
        for hidden in
            ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.100.100.200", "0.1.2.3", "224.0.0.1"]
        {
            for disguise in disguises(hidden.parse().unwrap()) {
                assert_eq!(scope(disguise.into()), Err(Forbidden::Hidden), "{disguise} for {hidden}");
            }
        }
        let public: Ipv4Addr = "93.184.215.14".parse().unwrap();
        for disguise in disguises(public) {
            assert_eq!(scope(disguise.into()), Ok(Scope::Public), "{disguise}");
        }
    }

    #[test]
    fn an_ipv6_address_means_the_ipv4_address_in_it() {
        let hidden: Ipv4Addr = "93.184.215.14".parse().unwrap();
        // A Teredo address reaches its client, not the server in it.
        let is_server = |disguise: &Ipv6Addr| disguise.segments()[..3] == [0x2001, 0, 0x5db8];
        for disguise in disguises(hidden).into_iter().filter(|disguise| !is_server(disguise)) {
            assert_eq!(meant(disguise.into()), IpAddr::V4(hidden), "{disguise}");
        }
        assert_eq!(meant(hidden.to_ipv6_mapped().into()), IpAddr::V4(hidden));
        for itself in ["::", "::1", "2606:4700::1111", "fe80::1", "10.0.0.1"] {
            let address: IpAddr = itself.parse().unwrap();
            assert_eq!(meant(address), address);
        }
    }

    #[test]
    fn a_url_is_taken_only_in_a_spelling_that_everybody_reads_alike() {
        for taken in [
            "http://example.com",
            "HTTPS://example.com:8443/mcp?x=%20",
            "http://user:pass@example.com/",
            "http://exämple.com/{a}",
            "http://127.1/",
            "http://0x7f.1:9/",
            "http://[::1]/",
            "http://localhost./x",
            "http://169.254.169.254@example.com/",
            "http://example.com/@169.254.169.254",
            "http://a:/",
        ] {
            assert!(server_url(taken).is_ok(), "{taken}: {:?}", server_url(taken));
        }
        for (refused, error) in [
            ("", UrlError::Syntax),
            ("example.com", UrlError::Syntax),
            ("ftp://example.com", UrlError::Syntax),
            ("http:example.com", UrlError::Syntax),
            ("http:///example.com", UrlError::Syntax),
            ("http://example.com\\@x", UrlError::Syntax),
            ("http://exam\tple.com", UrlError::Syntax),
            (" http://example.com", UrlError::Syntax),
            ("http://example.com/#x", UrlError::Syntax),
            ("http://[fe80::1%25eth0]/", UrlError::Syntax),
            ("http://1.2.3.4.5/", UrlError::Syntax),
            ("http://256.1.1.1/", UrlError::Syntax),
            ("http://a@b@c/", UrlError::Ambiguous),
            ("http://example.com:0/", UrlError::Ambiguous),
            ("http://%31%32%37.0.0.1/", UrlError::Ambiguous),
            ("http://１２７.0.0.1/", UrlError::Ambiguous),
            ("http://①②⑦.⓪.⓪.①/", UrlError::Ambiguous),
            ("http://127。0。0。1/", UrlError::Ambiguous),
            ("http://local\u{ad}host/", UrlError::Ambiguous),
            ("http://ｍetadata.google.internal/", UrlError::Ambiguous),
            ("http://metadata.google.internal./", UrlError::Forbidden(Forbidden::Metadata)),
            ("http://METADATA.Google.Internal/", UrlError::Forbidden(Forbidden::Metadata)),
            ("http://0xa9fea9fe/", UrlError::Forbidden(Forbidden::Metadata)),
            ("http://0/", UrlError::Forbidden(Forbidden::Unspecified)),
            ("http://[::]/", UrlError::Forbidden(Forbidden::Unspecified)),
            ("http://[::127.0.0.1]/", UrlError::Forbidden(Forbidden::Hidden)),
        ] {
            assert_eq!(server_url(refused), Err(error), "{refused}");
        }
    }
}
