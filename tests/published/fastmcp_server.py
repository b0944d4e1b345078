"""A FastMCP server as its users write them: `fastmcp_server.py stdio|http`. On http the first line of stdout is its URL."""

import asyncio
import os
import socket
import sys
from typing import Annotated, Literal

import uvicorn
from fastmcp import Context, FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.utilities.types import File, Image
from pydantic import BaseModel, Field

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63644cf8cf500f00038601806"
    "2d5a8f5d60000000049454e44ae426082"
)
mcp = FastMCP("published-fastmcp")


class Place(BaseModel):
    city: str
    population: Annotated[int, Field(ge=0)] = 0


@mcp.tool
def greet(name: str, punctuation: Literal["!", "."] = "!") -> str:
    """Greets someone"""
    return f"Hello, {name}{punctuation}"


@mcp.tool(title="A place, described", annotations={"readOnlyHint": True}, output_schema=Place.model_json_schema())
def describe(place: Place) -> Place:
    """Takes and gives a model"""
    return Place(city=place.city.upper(), population=place.population + 1)


@mcp.tool(output_schema=None)
def picture() -> list:
    """A text and an image"""
    return ["a pixel:", Image(data=PIXEL, format="png")]


@mcp.tool(output_schema=None)
def document() -> list:
    """A text resource and a binary one"""
    return [File(data=b"body", format="txt", name="a"), File(data=b"\0\1", format="bin", name="b")]


@mcp.tool
def fail() -> str:
    """Always fails"""
    raise ToolError("this tool failed as it should")


@mcp.tool
async def slow(steps: int, ctx: Context) -> str:
    """Reports progress"""
    for step in range(steps):
        await ctx.report_progress(step + 1, steps)
        await asyncio.sleep(0.05)
    return f"{steps} steps"


@mcp.tool
def about(ctx: Context) -> dict:
    """The process and the protocol revision spoken"""
    return {"pid": os.getpid(), "protocol": ctx.request_context.protocol_version}


async def serve():
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
    config = uvicorn.Config(mcp.http_app(path="/mcp"), log_level="warning", timeout_graceful_shutdown=1)
    await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        mcp.run(transport="stdio", show_banner=False)
    else:
        asyncio.run(serve())
