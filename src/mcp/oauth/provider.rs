//! The authorization server of an MCP server: found, registered with, and asked for the page to sign in at, by rmcp's
//! [`AuthorizationManager`] (RFC 9728, 8414, 7591, 7636, 8707).
//!
//! What rmcp does not do is done by hand: it keeps the secret of a client that it registers to itself, and forgets it at a
//! restart; its state has 128 bits; and it has no way back to a resource that it has discovered.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rmcp::transport::auth::{
    AuthError, AuthorizationManager, AuthorizationMetadata, InMemoryStateStore, OAuthClientConfig, StateStore,
};
use url::{Host, Url};

use crate::model::{OauthClient, Secret};

use super::super::egress::Egress;
use super::token::Endpoint;
use super::way::{Problem, Way};

const CLIENT_NAME: &str = "Portolan";
const STATE_BYTES: usize = 32;
/// The parameters of the page to sign in at that Portolan sets (RFC 6749, 4.1.1; RFC 7636, 4.3; RFC 8707, 2).
const OWN_PARAMETERS: [&str; 8] = [
    "response_type",
    "client_id",
    "redirect_uri",
    "scope",
    "state",
    "resource",
    "code_challenge",
    "code_challenge_method",
];

/// An authorization server.
pub struct Provider {
    manager: AuthorizationManager,
    metadata: AuthorizationMetadata,
    /// It says so itself: MCP 2025-03-26 guesses where nothing is said.
    pub is_published: bool,
    pub way: Way,
}

/// A sign-in that waits for its person.
pub struct Begun {
    /// The page to sign in at.
    pub url: Url,
    pub state: String,
    pub verifier: Secret,
    pub client_id: String,
    pub client_secret: Option<Secret>,
    /// What is asked for, separated by spaces.
    pub scope: Option<String>,
    /// RFC 8707.
    pub resource: String,
    /// The answer comes with `iss` (RFC 9207).
    pub promises_issuer: bool,
}

/// A server's URL as authorization servers may see it: without what may be secret in it.
pub fn bare(server_url: &str) -> Result<Url, Problem> {
    let mut url = Url::parse(server_url).map_err(|_| Problem::Url)?;
    // They can be taken away: the URL has a host.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

impl Provider {
    /// Finds the authorization server of the server at this URL; `challenge` is the `WWW-Authenticate` of its 401.
    pub async fn find(egress: &Egress, server_url: &str, challenge: Option<&str>) -> Result<Self, Problem> {
        let url = bare(server_url)?;
        let way = Way::new(egress.clone(), url.clone());
        let client = std::sync::Arc::new(way.clone());
        let manager = AuthorizationManager::new_with_oauth_http_client(url, client).await;
        let mut manager = manager.map_err(|_| Problem::Url)?;
        match manager.resolve_metadata_from_challenge(challenge).await {
            Ok(found) => {
                manager.set_metadata(found.metadata.clone());
                Ok(Self { manager, metadata: found.metadata, is_published: found.source.is_discovered(), way })
            }
            Err(error) => Err(reason(&way, error).await),
        }
    }

    pub fn issuer(&self) -> Option<&str> {
        self.metadata.issuer.as_deref()
    }

    /// Where tokens are asked for.
    pub fn endpoint(&self) -> Endpoint {
        let methods = self.metadata.additional_fields.get("token_endpoint_auth_methods_supported");
        let has = |method: &str| {
            methods
                .and_then(|methods| methods.as_array())
                .is_some_and(|methods| methods.iter().any(|one| one == method))
        };
        Endpoint {
            url: self.metadata.token_endpoint.clone(),
            posts_secret: has("client_secret_post") && !has("client_secret_basic"),
        }
    }

    /// What tokens are asked for (RFC 8707). rmcp says it in an authorization URL alone; of this one nothing else is used,
    /// so that it is made whatever the authorization server can do.
    pub async fn resource(&mut self) -> Result<String, Problem> {
        let mut metadata = self.metadata.clone();
        metadata.response_types_supported = None;
        metadata.code_challenge_methods_supported = None;
        self.manager.set_metadata(metadata);
        let page = self.page("", "http://127.0.0.1/", &[]).await;
        self.manager.set_metadata(self.metadata.clone());
        parameter(&page?, "resource").ok_or(Problem::Metadata)
    }

    /// Begins a sign-in: as `client` if there is one, else by the document at `metadata_url` if that is taken, else as a
    /// client that is registered now (MCP 2025-11-25, client registration).
    pub async fn begin(
        mut self,
        client: Option<&OauthClient>,
        metadata_url: Option<&str>,
        redirect_uri: &str,
    ) -> Result<Begun, Problem> {
        let scopes = match client.and_then(|client| client.scope.as_deref()) {
            Some(scope) => scope.split_whitespace().map(str::to_owned).collect(),
            None => self.manager.select_initial_scopes(&[]).await,
        };
        let scopes: Vec<&str> = scopes.iter().map(String::as_str).collect();
        let (client_id, client_secret) =
            match (client, metadata_url.filter(|_| self.has("client_id_metadata_document_supported"))) {
                (Some(client), _) => (client.client_id.clone(), client.client_secret.clone()),
                (None, Some(url)) => (url.to_owned(), None),
                (None, None) => {
                    // The type of the client to be registered is that of the one before.
                    let web = OAuthClientConfig::new("", redirect_uri).with_application_type("web");
                    self.manager.configure_client(web).map_err(|_| Problem::Metadata)?;
                    match self.manager.register_client(CLIENT_NAME, redirect_uri, &scopes).await {
                        Ok(client) => (client.client_id, client.client_secret.map(Secret::from)),
                        Err(error) => return Err(reason(&self.way, error).await),
                    }
                }
            };
        let states = InMemoryStateStore::new();
        self.manager.set_state_store(states.clone());
        let mut url = self.page(&client_id, redirect_uri, &scopes).await?;
        let saved = match parameter(&url, "state") {
            Some(state) => states.load(&state).await.ok().flatten().ok_or(Problem::Metadata)?,
            None => return Err(Problem::Metadata),
        };
        let state = new_state();
        set_parameter(&mut url, "state", &state);
        if !is_safe_page(&url) {
            return Err(Problem::Page);
        }
        Ok(Begun {
            resource: parameter(&url, "resource").ok_or(Problem::Metadata)?,
            url,
            state,
            verifier: saved.pkce_verifier.into(),
            client_id,
            client_secret,
            scope: Some(scopes.join(" ")).filter(|scope| !scope.is_empty()),
            promises_issuer: saved.require_issuer,
        })
    }

    fn has(&self, capability: &str) -> bool {
        self.metadata.additional_fields.get(capability).is_some_and(|value| value == true)
    }

    async fn page(&mut self, client_id: &str, redirect_uri: &str, scopes: &[&str]) -> Result<Url, Problem> {
        if Url::parse(&self.metadata.authorization_endpoint).is_ok_and(|page| has_own_parameter(&page)) {
            return Err(Problem::Parameters);
        }
        let config = OAuthClientConfig::new(client_id, redirect_uri).with_application_type("web");
        let page = match self.manager.configure_client(config) {
            Ok(()) => self.manager.get_authorization_url(scopes).await,
            Err(error) => Err(error),
        };
        match page {
            Ok(page) => Url::parse(&page).map_err(|_| Problem::Metadata),
            Err(error) => Err(reason(&self.way, error).await),
        }
    }
}

/// What an error of rmcp means; its own texts quote URLs and other people's words.
async fn reason(way: &Way, error: AuthError) -> Problem {
    if let Some(problem) = way.failure() {
        return problem;
    }
    match error {
        AuthError::PkceUnsupported => Problem::Pkce,
        AuthError::RegistrationFailed(_) => Problem::Registration,
        AuthError::AuthorizationServerMismatch { .. } | AuthError::AuthorizationServerMissingIssuer { .. } => {
            Problem::Issuer
        }
        // rmcp leaves out private addresses without asking.
        AuthError::AuthorizationServersUnavailable { authorization_servers, .. } => {
            for server in authorization_servers {
                if let Err(problem @ Problem::Forbidden(_)) = way.check(&server).await {
                    return problem;
                }
            }
            Problem::Metadata
        }
        _ => Problem::Metadata,
    }
}

fn new_state() -> String {
    let mut bytes = [0; STATE_BYTES];
    getrandom::fill(&mut bytes).expect("the operating system has random numbers");
    URL_SAFE_NO_PAD.encode(bytes)
}

fn parameter(url: &Url, name: &str) -> Option<String> {
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn set_parameter(url: &mut Url, name: &str, value: &str) {
    let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    let mut query = url.query_pairs_mut();
    query.clear();
    for (key, old) in &pairs {
        query.append_pair(key, if key == name { value } else { old });
    }
}

/// Whether a page comes with a parameter that is Portolan's to set: of two, an authorization server may take the other
/// (RFC 6749, 3.1 forbids them; RFC 8707, 2 has several resources).
fn has_own_parameter(page: &Url) -> bool {
    page.query_pairs().any(|(name, _)| OWN_PARAMETERS.contains(&&*name))
}

/// Whether a person may be sent there: over https, or to their own machine.
fn is_safe_page(url: &Url) -> bool {
    let is_local = match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    url.scheme() == "https" || (url.scheme() == "http" && is_local)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn people_are_sent_to_https_or_to_their_own_machine() {
        let safe = |url| is_safe_page(&Url::parse(url).unwrap());
        for good in ["https://a.example/x", "http://localhost:1/", "http://127.0.0.2/", "http://[::1]/"] {
            assert!(safe(good), "{good}");
        }
        for bad in
            ["http://a.example/", "http://10.0.0.1/", "javascript:alert(1)", "file:///etc", "http://localhost.a/"]
        {
            assert!(!safe(bad), "{bad}");
        }
    }

    #[test]
    fn a_state_has_256_bits_and_takes_the_place_of_the_one_before() {
        let state = new_state();
        assert_eq!(URL_SAFE_NO_PAD.decode(&state).unwrap().len(), 32);
        assert_ne!(state, new_state());
        let mut url = Url::parse("https://a.example/x?a=1%202&state=old&b=%26").unwrap();
        set_parameter(&mut url, "state", "new");
        let pairs: Vec<_> = url.query_pairs().into_owned().collect();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(pairs, [pair("a", "1 2"), pair("state", "new"), pair("b", "&")]);
    }

    #[test]
    fn authorization_servers_see_nothing_secret_of_a_url() {
        assert_eq!(bare("https://user:word@a.example/mcp?key=1#x").unwrap().as_str(), "https://a.example/mcp");
    }
}
