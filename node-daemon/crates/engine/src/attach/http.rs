//! Health and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`. One short request for each
//! connection, bounded in bytes and time.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tercet_nvmf::host::PathState;
use tercet_nvmf::log::AnaState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Attacher;

const REQUEST_BYTES_MAX: usize = 4096;
const TIMEOUT: Duration = Duration::from_secs(5);

/// Serves for ever.
pub async fn serve(listener: TcpListener, attacher: Arc<Attacher>) {
    loop {
        match listener.accept().await {
            // One after the other: scrapers are few, and a slow one costs at most the time-out.
            Ok((stream, _)) => {
                let _ = tokio::time::timeout(TIMEOUT, answer(stream, &attacher)).await;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(mut stream: TcpStream, attacher: &Attacher) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut buffer).await?;
        if count == 0 || request.len() + count > REQUEST_BYTES_MAX {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..count]);
    }
    let line = String::from_utf8_lossy(&request);
    let (status, body) = match line.split_whitespace().nth(1) {
        Some("/healthz" | "/readyz") => ("200 OK", "ok\n".to_owned()),
        Some("/metrics") => ("200 OK", metrics(attacher)),
        _ => ("404 Not Found", "there are /healthz, /readyz and /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await
}

fn metrics(attacher: &Attacher) -> String {
    let attached = attacher.list();
    let mut text = String::from(
        "# HELP tercet_attach_volumes Volumes attached on this node.\n\
         # TYPE tercet_attach_volumes gauge\n",
    );
    let _ = writeln!(text, "tercet_attach_volumes {}", attached.len());
    text.push_str(
        "# HELP tercet_attach_path_up Whether a path is connected, by its ANA state.\n\
         # TYPE tercet_attach_path_up gauge\n",
    );
    for volume in &attached {
        for (endpoint, state) in &volume.status.paths {
            let (up, ana) = match state {
                PathState::Connecting => (0, "unknown"),
                PathState::Live(AnaState::Optimized) => (1, "optimized"),
                PathState::Live(_) => (1, "other"),
            };
            let nqn = &volume.nqn;
            let labels = format!("subsystem=\"{nqn}\",endpoint=\"{endpoint}\",ana=\"{ana}\"");
            let _ = writeln!(text, "tercet_attach_path_up{{{labels}}} {up}");
        }
    }
    text
}
