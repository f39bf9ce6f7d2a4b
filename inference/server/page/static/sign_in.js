// Who follows a link from another site comes without the cookie, which is kept to requests of our own pages, and so lands
// here although signed in. This request is one of our own.
const answer = await fetch("page/summary", { redirect: "manual", cache: "no-store" });
if (answer.ok) location.replace("./");
