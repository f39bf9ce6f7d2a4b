"""What a Supabase project answers of what examples/nextjs asks, over a real PostgreSQL and real files.

Where it was seen: paths and bodies of the storage are those of supabase/storage-js, src/packages/StorageFileApi.ts
(`createSignedUrl`, `createSignedUploadUrl`, `upload`), and of supabase/storage, src/http/routes/object; it refuses to
sign what is missing or taken, as measured with the real storage server. PostgREST runs each request as one transaction
under the role of its token.

Keys: a secret key (`sb_secret_…`) is no JWT, so the database refuses it as a bearer token; a service role's key of
earlier projects is one, and without it as a bearer token the request is nobody's ("Known limitations" of
supabase.com/docs/guides/api/api-keys).

Rights: since 2026-10-30 nobody but its owner may use a new table in `public` until that is granted; before, the three
roles had all rights on whatever was made there (supabase.com/changelog/45329).
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from inference.errors import ObjectExists, ObjectMissing
from inference.server.listening import listen, serve_app
from inference.server.objects import ObjectStore, Signer
from inference.server.storage_api import DOWNLOAD_PREFIX, UPLOAD_PREFIX, refusal, storage_routes
from tests.server import harness

SECRET_KEY = "sb_secret_key"
SERVICE_KEY = "eyJ.service-role.key"
"""Of earlier projects."""

PROJECT = """
create schema auth;
create table auth.users (id uuid primary key);
create function auth.uid() returns uuid language sql stable as
  $$ select nullif(current_setting('request.jwt.claims', true)::json->>'sub', '')::uuid $$;
do $$ begin
  create role anon nologin; create role authenticated nologin; create role service_role nologin bypassrls;
exception when duplicate_object then null; end $$;
grant usage on schema public, auth to anon, authenticated, service_role;
"""
"""What the SQL of an application finds in a new project."""

EARLIER = """
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
"""
"""What it finds besides in a project whose owner has not taken that back."""


class Supabase:
    """A project with nobody in it."""

    def __init__(self, database_url: str, folder: Path, rights: str = "") -> None:
        self.database_url = database_url
        self.users: dict[str, str] = {}  # ids, by the access token of a session
        self.url = ""
        self._config = harness.config(folder, database_url)
        self.objects = ObjectStore(self._config.storage_dir)
        self._signer = Signer("secret")
        self.sql(PROJECT + rights)

    def sql(self, text: str, *values: object, as_user: str | None = None) -> list[Any]:
        """Rows of one transaction: of the owner of all, or of somebody who is signed in."""
        with psycopg.connect(self.database_url) as connection:
            if as_user is not None:
                claims = json.dumps({"sub": as_user})
                connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
                connection.execute("set local role authenticated")
            found = connection.execute(text, values or None)
            return found.fetchall() if found.description else []

    def sign_up(self, token: str) -> str:
        """The id of a new user, who shows this token."""
        [[user_id]] = self.sql("insert into auth.users values (gen_random_uuid()) returning id::text")
        self.users[token] = user_id
        return user_id

    @contextmanager
    def running(self) -> Iterator[None]:
        """On loopback."""
        serve = partial(serve_app, stopping=Response(status_code=503))
        with listen("127.0.0.1", 0) as listener, start_blocking_portal() as portal:
            stopped, (host, port) = portal.start_task(serve, self._app(), listener)
            self.url = f"http://{host}:{port}"
            try:
                yield
            finally:
                stopped.cancel()

    def _app(self) -> FastAPI:
        app = FastAPI()
        self._ask_for_the_key(app)
        self._add_database(app)
        self._add_storage(app)
        app.include_router(storage_routes(self._config, self.objects, self._signer))
        return app

    def _ask_for_the_key(self, app: FastAPI) -> None:
        @app.middleware("http")
        async def check(request: Request, call_next: Any) -> Response:
            by_token = request.url.path.startswith((DOWNLOAD_PREFIX, UPLOAD_PREFIX)) and request.method != "POST"
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            key = request.headers.get("apikey")
            fits = request.url.path == "/auth/v1/user" or token == ("" if key == SECRET_KEY else SERVICE_KEY)
            if not by_token and not (key in (SECRET_KEY, SERVICE_KEY) and fits):
                return JSONResponse({"message": "Invalid API key"}, 401)
            return await call_next(request)

    def _add_database(self, app: FastAPI) -> None:
        @app.exception_handler(psycopg.Error)
        async def refused(_request: Request, error: psycopg.Error) -> JSONResponse:
            return JSONResponse({"code": error.sqlstate, "message": str(error)}, 400)

        @app.get("/auth/v1/user")
        def user(request: Request) -> Response:
            user_id = self.users.get(request.headers["authorization"].removeprefix("Bearer "))
            return JSONResponse({"id": user_id}) if user_id else JSONResponse({"msg": "invalid JWT"}, 401)

        @app.post("/rest/v1/rpc/{name}")
        def rpc(name: str, given: dict[str, Any]) -> Response:
            assert all(re.fullmatch(r"\w+", word) for word in (name, *given))
            arguments = ", ".join(f"{each} => %s" for each in given)
            # As text, so that each has the type that the function says.
            texts = [None if value is None else str(value) for value in given.values()]
            return JSONResponse(self._rows(f"select * from {name}({arguments})", *texts))

        @app.get("/rest/v1/{table}")
        def select(table: str, request: Request) -> Response:
            assert re.fullmatch(r"\w+", table)
            wanted = request.query_params["id"].removeprefix("eq.")
            return JSONResponse(self._rows(f"select * from {table} where id = %s", wanted))

        @app.post("/rest/v1/{table}")
        def insert(table: str, row: dict[str, Any]) -> Response:
            assert all(re.fullmatch(r"\w+", word) for word in (table, *row))
            columns = ", ".join(row)
            text = f"insert into {table} ({columns}) select {columns} from json_populate_record(null::{table}, %s)"
            return JSONResponse(self._rows(f"{text} returning *", json.dumps(row)), 201)

    def _add_storage(self, app: FastAPI) -> None:
        @app.post(DOWNLOAD_PREFIX + "{bucket}/{path:path}")
        def sign(bucket: str, path: str) -> Response:
            if not self.objects.exists(path):
                return refusal(ObjectMissing("Object not found"), JSONResponse)
            token = self._signer.sign("download", f"{bucket}/{path}", 60)
            return JSONResponse({"signedURL": f"/object/sign/{quote(f'{bucket}/{path}')}?token={token}"})

        @app.post(UPLOAD_PREFIX + "{bucket}/{path:path}")
        def sign_upload(bucket: str, path: str) -> Response:
            if self.objects.exists(path):
                return refusal(ObjectExists("The resource already exists"), JSONResponse)
            token = self._signer.sign("upload", f"{bucket}/{path}", 60)
            return JSONResponse({"url": f"/object/upload/sign/{quote(f'{bucket}/{path}')}?token={token}"})

        @app.post("/storage/v1/object/{bucket}/{path:path}")
        async def upload(bucket: str, path: str, request: Request) -> Response:
            self.put(path, await request.body())
            return JSONResponse({"Key": f"{bucket}/{path}"})

    def put(self, path: str, body: bytes) -> None:
        """Stores an object."""
        with self.objects.incoming() as file:
            file.write(body)
            self.objects.place(file, path)

    def _rows(self, text: str, *values: object) -> list[Any]:
        with psycopg.connect(self.database_url) as connection:
            connection.execute("set local role service_role")
            found = connection.execute(f"with it as ({text}) select to_json(it) from it", values)
            return [row for [row] in found]
