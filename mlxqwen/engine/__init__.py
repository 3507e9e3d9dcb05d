"""The engine: requests in, tokens and events out. It owns the model.

A `Request` is one frozen value, checked where it is made. `Scheduler.submit` takes it and returns a `Handle`, which
gives the reply's events and its result, and cancels it. A step of the scheduler reads at most one chunk of the prompts
that wait and takes one token for each reply that runs, or several where a drafter guesses. `Engine`, `Conversation`,
`generate`, `stream_generate` and `batch_generate` make requests from messages and text, and tools run on top of them.

In go messages, text or token ids, with options; out come `Delta`s and `Done`, or `GenerationResponse`s.

What a request gets never depends on the requests that run beside it. One thread evaluates MLX at a time. Nothing here
prints, reads the command line or opens a socket.
"""
