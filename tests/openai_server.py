"""A chat-completions server on loopback, to ask and to suffer: one that misbehaves on order, or one over a real model.

    python tests/openai_server.py --log LOG [--orders ORDERS.json] [--delay S]
    python tests/openai_server.py --log LOG --model FOLDER

It prints its address and serves until it is killed. ORDERS maps a text to what becomes of the requests whose
prompt holds it, one order a request, the last one for ever: `good` (the default), `answer:TEXT`, `cut`, `empty`,
`null`, `no-sentinel`, `restated`, `surrogate`, `malformed`, `html`, `slow`, `drip`, `hang-up`, `echo` (a 500 that
prints the key it was sent), `surrogate-error`, `429:SECONDS` (with Retry-After) and any other status by its number.
The log gets a line of JSON for each answer sent: time, status, order, the prompt, and how many requests are in hand.
"""

import argparse
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SENTINEL = '[END OF REASONING]'
EXPLANATION = 'The first sentence says so in as many words, and nothing after it takes that back.'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: 'Server'

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        prompt = body['messages'][-1]['content']
        with self.server.lock:
            self.server.in_hand += 1
            order = self.server.order(prompt)
        time.sleep(self.server.delay)
        status, sent = 0, False
        try:
            status = self.obey(order, body, prompt)
            sent = True
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.note(
                    time=time.time(),
                    status=status,
                    sent=sent,
                    order=order,
                    prompt=prompt,
                    in_hand=self.server.in_hand,
                    authorization=self.headers.get('Authorization'),
                    body={key: value for key, value in body.items() if key != 'messages'},
                )
                self.server.in_hand -= 1

    def obey(self, order: str, body: dict, prompt: str) -> int:
        name, _, value = order.partition(':')
        answer = re.search(r'(?m)^Correct answer: (.*)$', prompt)
        answer = answer[1] if answer else '?'
        if name == 'model':
            return self.complete(**self.server.answer_by_model(body))
        if name == '429':
            return self.send(429, {'error': {'message': 'slow down'}}, {'Retry-After': value or '1'})
        if name == 'echo':
            return self.send(500, {'error': {'message': f'debug: {self.headers["Authorization"]}'}})
        if name == 'surrogate-error':
            return self.send(400, {'error': {'message': 'bad \ud83d'}})
        if name.isdecimal():
            return self.send(int(name), {'error': {'message': value or f'status {name} on order'}})
        if name == 'malformed':
            return self.send(200, b'{"choices": [{"message": {"conte')
        if name == 'html':
            return self.send(200, b'<html>Welcome to the hotel Wi-Fi</html>', {'Content-Type': 'text/html'})
        if name == 'slow':
            time.sleep(float(value or 3))
        if name == 'drip':
            return self.drip()
        if name == 'hang-up':
            self.close_connection = True
            self.send(200, b'{"choices": [', {'Content-Length': '1000'})
            return 0
        texts = {
            'answer': value,
            'cut': EXPLANATION[:40],
            'empty': '',
            'no-sentinel': f'{EXPLANATION}\n{answer}',
            'restated': f'So the answer is {answer}.\n{SENTINEL}\n{answer}',
            'null': None,
            'surrogate': '\ud800',
        }
        text = texts.get(name, f'{EXPLANATION}\n{SENTINEL}\n{answer}')
        return self.complete(text, 'length' if name == 'cut' else 'stop', len(prompt) // 4, len(text or '') // 4)

    def complete(self, text: str | None, finish_reason: str, tokens_in: int, tokens_out: int) -> int:
        message = {'role': 'assistant', 'content': text}
        choice = {'index': 0, 'message': message, 'finish_reason': finish_reason}
        usage = {'prompt_tokens': tokens_in, 'completion_tokens': tokens_out, 'total_tokens': tokens_in + tokens_out}
        reply = {'id': 'x', 'object': 'chat.completion', 'created': 0, 'model': 'm', 'choices': [choice]}
        return self.send(200, {**reply, 'usage': usage})

    def send(self, status: int, content: dict | bytes, headers: dict | None = None) -> int:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for item in {'Content-Type': 'application/json', 'Content-Length': len(content), **(headers or {})}.items():
            self.send_header(item[0], str(item[1]))
        self.end_headers()
        self.wfile.write(content)
        return status

    def drip(self) -> int:
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', '1000')
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b' ')
            time.sleep(0.1)
        return 200

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, log: str, orders: str | None, delay: float, model: str | None, port: int):
        super().__init__(('127.0.0.1', port), Handler)
        self.lock, self.model_lock, self.in_hand, self.delay = threading.Lock(), threading.Lock(), 0, delay
        self.log = open(log, 'a', buffering=1)  # noqa: SIM115
        self.orders = {}
        if orders:
            with open(orders) as file:
                self.orders = json.load(file)
        self.model = None
        if model:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def order(self, prompt: str) -> str:
        if self.model is not None:
            return 'model'
        for text, orders in self.orders.items():
            if text in prompt:
                return orders.pop(0) if len(orders) > 1 else orders[0]
        return 'good'

    def note(self, **entry) -> None:
        self.log.write(json.dumps(entry) + '\n')

    def answer_by_model(self, body: dict) -> dict:
        """The model goes on from the prompt as it is: a small one follows examples better than orders."""
        inputs = self.tokenizer(body['messages'][-1]['content'], return_tensors='pt')
        sampling = {'temperature': body['temperature'], 'top_p': body['top_p']} if body['temperature'] else {}
        stops = body.get('stop') or []
        with self.model_lock:
            output = self.model.generate(
                **inputs,
                **sampling,
                do_sample=bool(sampling),
                max_new_tokens=body['max_tokens'],
                stop_strings=stops or None,
                tokenizer=self.tokenizer,
                pad_token_id=0,
            )[0]
        new = output[inputs['input_ids'].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        stopped = len(new) < body['max_tokens'] or any(stop in text for stop in stops)
        for stop in stops:
            text = text.partition(stop)[0]
        return {
            'text': text,
            'finish_reason': 'stop' if stopped else 'length',
            'tokens_in': inputs['input_ids'].shape[1],
            'tokens_out': len(new),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--log', required=True)
    parser.add_argument('--orders')
    parser.add_argument('--delay', type=float, default=0.0, help='seconds before any answer')
    parser.add_argument('--model', help='folder of a causal language model that answers')
    parser.add_argument('--port', type=int, default=0)
    args = parser.parse_args()
    server = Server(args.log, args.orders, args.delay, args.model, args.port)
    print(f'http://127.0.0.1:{server.server_address[1]}/v1', flush=True)
    server.serve_forever()


if __name__ == '__main__':
    main()
