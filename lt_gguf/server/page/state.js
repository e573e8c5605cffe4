// What the modules share: what the server said about itself, the conversation, and the answer that is being made.

export const state = {
  info: null,     // GET lt/info
  session: null,  // {id, title, named, updated, messages, draft: {text, documents}}
  running: null,  // {controller, progress, ...} while an answer is made, chat.js
};
