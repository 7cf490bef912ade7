"""As much of the Hugging Face hub as uploads meet: creates a repository, lists it, takes commits of plain files."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Keeps ``repos`` (name to files) and ``tokens`` seen on its server."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.server.tokens.add(self.headers.get('Authorization'))
        if self.headers.get('Authorization') != 'Bearer hf_good':
            return self._answer(401, {'error': 'Invalid credentials in Authorization header'})
        if self.path == '/api/validate-yaml':
            return self._answer(200, {'errors': [], 'warnings': []})
        if self.path == '/api/repos/create':
            asked = json.loads(body)
            repo = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
            self.server.repos.setdefault(repo, {})
            # huggingface_hub 1 has another word for it.
            self.server.private[repo] = asked.get('private') or asked.get('visibility') == 'private'
            return self._answer(200, {'url': f'{self.server.address}/{repo}'})
        repo, action = self.path.removeprefix('/api/models/').rsplit('/', 2)[0], self.path.rsplit('/', 2)[1]
        if action == 'preupload':
            files = [{**file, 'uploadMode': 'regular', 'shouldIgnore': False} for file in json.loads(body)['files']]
            return self._answer(200, {'files': files})
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                self.server.repos[repo][line['value']['path']] = base64.b64decode(line['value']['content'])
            elif line['key'] == 'deletedFile':
                del self.server.repos[repo][line['value']['path']]
            elif line['key'] == 'header':
                self.server.messages.append(line['value']['summary'])
        self._answer(200, {'commitUrl': f'{self.server.address}/{repo}/commit/1', 'commitOid': '1' * 40})

    def do_GET(self):
        if self.headers.get('Authorization') != 'Bearer hf_good':
            return self._answer(401, {'error': 'Invalid credentials in Authorization header'})
        path = self.path.removeprefix('/api/models/')
        repo, tree, _ = path.partition('/tree/')
        if tree:
            files = self.server.repos[repo].items()
            return self._answer(
                200, [{'type': 'file', 'path': name, 'size': len(data), 'oid': '0' * 40} for name, data in files]
            )
        repo = path.split('/revision/')[0]
        self._answer(200, {'id': repo, 'sha': '0' * 40, 'xetEnabled': False})

    def _answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve() -> ThreadingHTTPServer:
    """A server that runs, on a free port of loopback."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.address = f'http://127.0.0.1:{server.server_port}'
    server.repos, server.private, server.tokens, server.messages = {}, {}, set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
