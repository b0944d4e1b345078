"""An MCP server that wants a sign-in, and its authorization server, on one origin and both from the published `mcp` package.
The consent page asks the user, with a button for each answer. The first line of stdout is the URL to connect to.
"""

import html
import secrets
import socket
import time

import anyio
import mcp_types as types
import uvicorn
from mcp.server.auth.provider import (
    AccessToken,
    AuthorizationCode,
    OAuthAuthorizationServerProvider,
    ProviderTokenVerifier,
    RefreshToken,
    construct_redirect_uri,
)
from mcp.server.auth.settings import AuthSettings, ClientRegistrationOptions
from mcp.server.lowlevel import Server
from mcp.shared.auth import OAuthToken
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Route

HOUR = 3600


class Books(OAuthAuthorizationServerProvider):
    """Who registered, who asks, and what was given out."""

    def __init__(self, origin):
        self.origin = origin
        self.clients, self.asking, self.codes, self.access, self.refresh = {}, {}, {}, {}, {}

    async def get_client(self, client_id):
        return self.clients.get(client_id)

    async def register_client(self, client_info):
        self.clients[client_info.client_id] = client_info

    async def authorize(self, client, params):
        question = secrets.token_urlsafe(16)
        self.asking[question] = (client, params)
        return f"{self.origin}/consent?question={question}"

    def answer(self, question, allowed):
        """Where the browser goes from the consent page."""
        client, params = self.asking.pop(question)
        back = str(params.redirect_uri)
        if not allowed:
            return construct_redirect_uri(back, error="access_denied", state=params.state)
        code = secrets.token_urlsafe(32)
        self.codes[code] = AuthorizationCode(
            code=code,
            client_id=client.client_id,
            scopes=params.scopes or [],
            expires_at=time.time() + 60,
            code_challenge=params.code_challenge,
            redirect_uri=params.redirect_uri,
            redirect_uri_provided_explicitly=params.redirect_uri_provided_explicitly,
            resource=params.resource,
            subject="somebody",
        )
        return construct_redirect_uri(back, code=code, state=params.state)

    def tokens(self, grant):
        access, refresh = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        known = {"client_id": grant.client_id, "scopes": grant.scopes, "resource": grant.resource, "subject": grant.subject}
        self.access[access] = AccessToken(token=access, expires_at=int(time.time()) + HOUR, **known)
        self.refresh[refresh] = RefreshToken(token=refresh, **known)
        return OAuthToken(access_token=access, refresh_token=refresh, expires_in=HOUR, scope=" ".join(grant.scopes))

    async def load_authorization_code(self, client, authorization_code):
        return self.codes.get(authorization_code)

    async def exchange_authorization_code(self, client, authorization_code):
        return self.tokens(self.codes.pop(authorization_code.code))

    async def load_refresh_token(self, client, refresh_token):
        return self.refresh.get(refresh_token)

    async def exchange_refresh_token(self, client, refresh_token, scopes):
        return self.tokens(self.refresh.pop(refresh_token.token))

    async def load_access_token(self, token):
        return self.access.get(token)

    async def revoke_token(self, token):
        self.access.pop(token.token, None)
        self.refresh.pop(token.token, None)


def consent(books):
    async def page(request):
        question = html.escape(request.query_params["question"])
        return HTMLResponse(
            "<!doctype html><html lang=en><title>Consent</title><h1>May Portolan act for you?</h1>"
            f"<form method=post><input type=hidden name=question value='{question}'>"
            "<button name=answer value=yes>Allow</button><button name=answer value=no>Refuse</button></form>"
        )

    async def answer(request):
        form = await request.form()
        return RedirectResponse(books.answer(form["question"], form["answer"] == "yes"), 303)

    return [Route("/consent", page, methods=["GET"]), Route("/consent", answer, methods=["POST"])]


async def list_tools(_ctx, _params):
    nothing = {"type": "object", "properties": {}}
    return types.ListToolsResult(tools=[types.Tool(name="notes", description="The notes of whoever signed in", input_schema=nothing)])


async def call_tool(_ctx, _params):
    return types.CallToolResult(content=[types.TextContent(type="text", text="a private note")])


async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    books = Books(origin)
    app = Server("notes", version="1.0.0", on_list_tools=list_tools, on_call_tool=call_tool).streamable_http_app(
        auth=AuthSettings(
            issuer_url=origin,
            resource_server_url=f"{origin}/mcp",
            validate_token_resource=True,
            client_registration_options=ClientRegistrationOptions(enabled=True),
        ),
        token_verifier=ProviderTokenVerifier(books),
        auth_server_provider=books,
        custom_starlette_routes=consent(books),
    )
    print(f"{origin}/mcp", flush=True)
    await uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).serve(sockets=[listener])


if __name__ == "__main__":
    anyio.run(main)
