// Brings the parts of a page that are marked data-live up to date every few seconds, while somebody looks at it.
const SECONDS = 3;

async function refresh() {
  const parts = document.querySelectorAll("[data-live]");
  if (document.hidden || parts.length === 0) return;
  try {
    const answer = await fetch(location.href);
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of parts) {
      const fresh = page.getElementById(part.id);
      if (fresh && fresh.innerHTML !== part.innerHTML) part.replaceWith(fresh);
    }
  } catch {
    // The server has stopped; what was seen last stays.
  }
}

setInterval(refresh, SECONDS * 1000);
