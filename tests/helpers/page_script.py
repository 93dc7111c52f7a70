"""A script for the page of `moetier serve`: what the model says to messages that contain a mark."""

from __future__ import annotations

SCHEDULE = """<think>
The reader wants the idea first, and then a sketch of it. **LRFU** weighs how often and how lately.
</think>

## Why a cache for each block

Each block of the model has *its own* experts, so a cache for all of them would evict a record **just before** its \
next use. A block that keeps a few slots hits more often:

1. the experts that were used lately stay,
2. one that was used once leaves soon,
3. a long prompt may replace only a part.

```python
def evict(slots, now, decay=0.9):
    # The coldest record leaves: its score falls with time.
    scores = {slot: hits * decay ** (now - last) for slot, hits, last in slots}
    return min(scores, key=scores.get)
```

| policy | hits | what it knows |
|:--|--:|---|
| LRU | 41.2 % | the last use |
| LRFU | 46.8 % | how often, and when |

See [the paper](https://arxiv.org/abs/2312.17238) for the idea, and `moetier plan` for your machine."""
SHORT = "Of course. A slot holds one expert, so a budget of 3 GiB holds about 1,100 of them."
HOSTILE = """<script>document.title = "owned"</script><img src=x onerror="document.title='owned'">

[a link](javascript:document.title='owned') and [another](data:text/html,<script>1</script>)

<iframe src="https://example.com"></iframe> **bold <b>not bold</b>** `<i>code</i>`

```html
</code></pre><script>document.title = "owned"</script>
```
&lt;b&gt; ![picture](https://example.com/x.png)"""
LONG = "It goes on and on. " * 400
TEXTS = {"[long]": LONG, "[hostile]": HOSTILE, "Why does": SCHEDULE, "budget": SHORT}
SCRIPT = {"sessions": {}, "side": "Yes.", "end": "", "texts": TEXTS}
