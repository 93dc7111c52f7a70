// OpenAI's client for JavaScript, unchanged, that asks for answers of a given form: node structured_clients.mjs URL KEY
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const Person = z.object({
    name: z.string().max(10),
    kind: z.enum(["monk", "priest"]),
    numbers: z.array(z.number().int().min(1).max(99)).max(3),
});
const asked = { model: "agent", messages: [{ role: "user", content: "Who was don Abbondio?" }], max_tokens: 600, seed: 1 };

const chat = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Person, "person") });
Person.parse(chat.choices[0].message.parsed);
const stream = client.chat.completions.stream({ ...asked, response_format: zodResponseFormat(Person, "person") });
Person.parse((await stream.finalChatCompletion()).choices[0].message.parsed);
const tools = [zodFunction({ name: "person", parameters: Person })];
const called = await client.chat.completions.parse({ ...asked, tools, tool_choice: "required", parallel_tool_calls: false });
Person.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);
const response = await client.responses.parse({
    model: "agent", input: "Who was don Abbondio?", store: false, text: { format: zodTextFormat(Person, "person") },
});
Person.parse(response.output_parsed);
