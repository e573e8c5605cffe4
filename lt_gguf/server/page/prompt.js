// What the server is sent for a conversation.

/** A message as the model reads it: its documents, then what was asked. The server's states of documents hang on this form. */
export function textOf({ content, documents = [] }) {
  return [...documents.map(({ name, text }) => `Document ${name}:\n\n${text}\n\nEnd of the document ${name}.`), content].join("\n\n");
}

/** The messages of a request. Many chat templates want questions and answers in turn, so questions without an answer are joined. */
export function promptOf(messages, system) {
  const prompt = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    const content = message.role === "user" ? textOf(message) : message.content;
    if (message.role === "assistant" && !content) continue;
    const last = prompt.at(-1);
    if (last?.role === message.role) last.content += `\n\n${content}`;
    else prompt.push({ role: message.role, content });
  }
  return prompt;
}

/** How many characters of the last message stay as they are when its question is edited: its documents, and what is joined to them. */
export function beginningOf(messages, prompt) {
  const { content, documents = [] } = messages.at(-1);
  const count = (text) => [...text].length;  // characters as the server counts them
  return documents.length ? count(prompt.at(-1).content) - count(content) : 0;
}

/** Tokens in the context after the last answer that the server counted. */
export function tokensUsed(messages) {
  return messages.findLast((message) => message.figures)?.figures.used ?? 0;
}
