"""Chat templates that attack; run as a script, since nothing takes an audit hook out of a process again.

Prints one line of JSON per template: its name, how it ended, what it rendered, its seconds, what it touched.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

CANARY = "canary-of-the-environment"
SUBCLASSES = "''.__class__.__mro__[1].__subclasses__()"
INJECTIONS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ " + SUBCLASSES + " }}",
    "{{ " + SUBCLASSES + "[100]('id', shell=True) }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ [].__class__.__base__ }}",
    "{{ {}.__class__.__bases__[0] }}",
    "{{ messages.__class__ }}",
    "{{ messages['__class__'] }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages|attr('__cla' ~ 'ss__')|attr('__base__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ [messages]|map(attribute='__class__.__mro__')|list }}",
    "{{ [messages]|map('attr', '__class__')|list }}",
    "{{ [messages]|groupby('__class__') }}",
    "{{ [messages]|sum(attribute='__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__init__.__globals__}'.format(namespace) }}",
    "{{ ('{0.__class__}'|string).format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{% set f = '{0.__class__.__base__}'.format %}{{ f(messages) }}",
    "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self|attr('_TemplateReference__context') }}",
    "{{ namespace.__init__.__globals__['os'].system('touch stolen') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ lipsum.__globals__.__builtins__.open('stolen', 'w') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.__builtins__.__import__('os').system('touch stolen') }}",
    "{{ tojson.__globals__ }}",
    "{{ dict.__class__.__base__.__subclasses__() }}",
    "{{ range.__globals__ }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = messages %}{{ ns.__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch stolen') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ (messages|list).__reduce_ex__(2) }}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{{ environment.globals }}{{ context.environment }}{{ self.environment }}",
    "{{ config }}{{ request.application.__globals__ }}{{ get_flashed_messages.__globals__ }}",
    "{{ ''|attr(['_','_','class','_','_']|join) }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
]


def laughs(name: str) -> str:
    """Lists of lists, each twice the one before."""
    steps = (f"{{% set {name}{n} = [{name}{n - 1}, {name}{n - 1}] %}}" for n in range(1, 60))
    return f"{{% set {name}0 = ['lol'] %}}" + "".join(steps)


DOUBLE = "{% set ns = namespace(s='aa') %}{% for i in range(60) %}"
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a filter in a loop's test": "{% set r = range(99999)|list %}{% for a in r if r|sum < 0 %}{% endfor %}",
    "macros without end": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "deep recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "times": "{{ 'a' * 10 ** 9 }}",
    "times of lists": "{% set l = [0] * 10 ** 9 %}{{ l|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "powers of powers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling by plus": DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by tilde": DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by capture": "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = t %}{% endfor %}",
    "a billion laughs": laughs("a") + "{{ a59 }}",
    "a billion compared": laughs("a") + laughs("b") + "{{ a59 == b59 }}",
    "width of a format": "{{ '%1000000000d' % 1 }}",
    "width as an argument": "{{ '%*d' % (1000000000, 1) }}",
    "width of str.format": "{{ '{:1000000000}'.format(1) }}",
    "nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a'|center(10 ** 9) }}",
    "indent": "{{ ('a\n' * 10 ** 5)|indent(10 ** 5) }}",
    "join": "{{ ('a' * 10 ** 6).join('b' * 10 ** 5) }}",
    "join of a generator": "{{ ([0] * 9999)|map('default', 'a' * 10 ** 6, true)|join }}",
    "join as a filter": "{{ range(99999)|join('a' * 10 ** 6) }}",
    "replace": "{{ ('a' * 10 ** 6)|replace('a', 'b' * 10 ** 6) }}",
    "str.replace": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "to_bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "tojson": "{{ range(99999)|list|tojson(indent=10 ** 6) }}",
    "batch": "{{ [1]|batch(10 ** 9, 0)|list }}",
    "lists of texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + ['a' * 10 ** 6] %}{% endfor %}",
    "texts kept apart": "{% set ns = namespace(l=none) %}{% for i in range(9999) %}"
    "{% set ns.l = cycler(ns.l, 'a' * 10 ** 6 ~ i) %}{% endfor %}",
    "slices kept apart": "{% set s = 'a' * 10 ** 6 %}{% set ns = namespace(l=none) %}{% for i in range(9999) %}"
    "{% set ns.l = cycler(ns.l, s[i:]) %}{% endfor %}",
    "filler": "{{ lipsum(10 ** 6, true, 10 ** 6, 10 ** 7) }}",
    "splits": "{{ ('a ' * 4999999).split()|length }}",
    "sum of lists": "{{ ([range(99)|list] * 9999)|sum(start=[])|length }}",
    "constant in a loop": "{% set s %}{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}{% endset %}",
    "a long template": "x" * 100_001,
    "only on a certain row": "{% if messages[0].content == 'Hi' %}{{ 'a' * 10 ** 9 }}{% endif %}",
}
LONG = {
    *("loops that write", "a filter in a loop's test", "macros without end", "a billion compared", "slices kept apart"),
    *("texts kept apart", "sum of lists"),
}
"""Those that take the longest until they are stopped."""
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
QUIET = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "import", "tempfile.", "urllib.")


def megabytes() -> int:
    """The most memory this program had. `ru_maxrss` would count that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def main() -> None:
    """Render every template, and print what came of it."""
    from ftcore.template_sandbox import compiled, rendered

    rendered("{% for m in messages %}{{ m|tojson }}{{ strftime_now('%Y') }}{% endfor %}", TALK)
    try:
        rendered("{{ [].append(1) }}", TALK)  # what telling of an error imports is imported now
    except Exception as failure:
        str(failure)
    touched: list[str] = []
    watching = False

    def hook(event: str, _: object) -> None:
        if watching and event.startswith(QUIET):
            touched.append(event)

    sys.addaudithook(hook)
    bombs = {name: text for name, text in BOMBS.items() if (name in LONG) == ("long" in sys.argv)}
    for name, text in {**{text: text for text in INJECTIONS}, **bombs}.items():
        touched.clear()
        began, output, error = time.process_time(), "", ""
        try:
            compiled(text) if len(text) < 100_000 else None
            watching = True
            output = rendered(text, TALK)[0]
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        watching = False
        took = time.process_time() - began
        peak = megabytes()
        line = {"name": name, "error": error, "output": output[:500], "seconds": took, "touched": touched, "peak": peak}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
