"""What `clair push` and `apo push` need of the hub's HTTP API: repositories, commits, uploads through LFS, and a token.

    python -m tests.clair.hub_server

prints its URL, with /v1 added, and ends with its parent or after four hours. Only the token `right-token` may write;
Parquet and weights go through LFS, as on the hub. GET /pushed lists every repository: its visibility, and its files,
base64.
Written from the requests of huggingface_hub 2.4; what the hub itself answers, nobody here has seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from aiohttp import web

from recipes.world.server import run_server

TOKEN = "right-token"
SECONDS_TO_LIVE = 4 * 3600
_LARGE = (".parquet", ".safetensors")
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")


class Hub:
    """Repositories by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20, middlewares=[self.guard])
        app.add_routes(
            [
                web.get("/pushed", self.pushed),
                web.post("/api/repos/create", self.create),
                web.post("/api/validate-yaml", self.validate),
                web.post("/datasets/{org}/{name}.git/info/lfs/objects/batch", self.batch),
                web.post("/{org}/{name}.git/info/lfs/objects/batch", self.batch),
                web.put("/lfs/{oid}", self.upload),
            ]
        )
        for kind in ("datasets", "models"):
            repository = f"/api/{kind}/{{org}}/{{name}}"
            app.add_routes(
                [
                    web.get(repository, self.information),
                    web.get(f"{repository}/revision/main", self.information),
                    web.post(f"{repository}/preupload/main", self.preupload),
                    web.post(f"{repository}/commit/main", self.commit),
                ]
            )
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        is_test_path = request.path.startswith(("/pushed", "/lfs/"))
        if not is_test_path and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid username or password."}, status=401)
        return await handler(request)

    async def pushed(self, _: web.Request) -> web.Response:
        repositories = {
            name: {**repository, "files": {p: base64.b64encode(c).decode() for p, c in repository["files"].items()}}
            for name, repository in self.repositories.items()
        }
        return web.json_response({"repositories": repositories, "seen": self.requests})

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"{body.get('organization')}/{body['name']}"
        folder = "datasets/" if body.get("type") == "dataset" else ""
        url = f"{request.url.origin()}/{folder}{name}"
        if name in self.repositories:
            return web.json_response({"error": "You already created this repo", "url": url}, status=409)
        self.repositories[name] = {"visibility": body.get("visibility"), "type": body.get("type"), "files": {}}
        return web.json_response({"url": url, "id": name})

    async def validate(self, request: web.Request) -> web.Response:
        """The card's front matter, as far as a key that every card of ours has, and the name of a base model."""
        card = await request.json()
        key = "task_categories:" if card["repoType"] == "dataset" else "library_name:"
        errors = [] if key in card["content"] else [{"message": f"no {key}"}]
        if (base := re.search(r"^base_model: (.*)$", card["content"], re.M)) and not _HUB_NAME.fullmatch(base[1]):
            errors.append({"message": f'"base_model" with value "{base[1]}" is not valid'})
        return web.json_response({"errors": errors, "warnings": []}, status=400 if errors else 200)

    async def information(self, request: web.Request) -> web.Response:
        name = self._name(request)
        private = self.repositories[name]["visibility"] == "private"
        return web.json_response({"id": name, "sha": "0" * 40, "siblings": [], "private": private})

    async def preupload(self, request: web.Request) -> web.Response:
        files = [
            {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in (await request.json())["files"])
        ]
        return web.json_response({"files": files})

    async def batch(self, request: web.Request) -> web.Response:
        objects = [
            {**o, "actions": {"upload": {"href": f"{request.url.origin()}/lfs/{o['oid']}"}}}
            for o in (await request.json())["objects"]
        ]
        return web.json_response({"transfer": "basic", "objects": objects})

    async def upload(self, request: web.Request) -> web.Response:
        content = await request.read()
        oid = hashlib.sha256(content).hexdigest()
        if oid != request.match_info["oid"]:
            return web.Response(status=422)
        self.objects[oid] = content
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        files = self.repositories[self._name(request)]["files"]
        for line in map(json.loads, (await request.text()).splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        url = f"{request.url.origin()}/{self._name(request)}"
        return web.json_response({"success": True, "commitUrl": f"{url}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _name(self, request: web.Request) -> str:
        return f"{request.match_info['org']}/{request.match_info['name']}"


if __name__ == "__main__":
    run_server(Hub().app(), 0, SECONDS_TO_LIVE)
