//! Volumes as block devices, and a load generator: see `docs/nvme-tcp.md`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tercet_engine::attach::args::{Args, Serve, USAGE};
use tercet_engine::attach::service::Service;
use tercet_engine::attach::{Attacher, bench, harden, http, record};
use tercet_engine::logging;
use tercet_engine::pb::attach::attacher_server::AttacherServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{error, info};

/// Exit code for a command line that cannot be.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let (log_format, args) = match Args::parse(std::env::args_os().skip(1)) {
        Ok(args @ (Args::Serve(_, format) | Args::Bench(_, format) | Args::Record(_, format))) => {
            (format, args)
        }
        Err(wrong) => {
            eprintln!("tercet-attach: {wrong}\n\n{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    logging::start(log_format);
    let result = match args {
        Args::Serve(serve_args, _) => {
            logging::abort_on_panic();
            serve(&serve_args)
        }
        Args::Bench(bench_args, _) => load(&bench_args),
        Args::Record(record_args, _) => record::run(&record_args).map_err(Failure::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!(error = %failure, "cannot run");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn load(args: &tercet_engine::attach::args::Bench) -> Result<(), Failure> {
    let report = bench::run(args)?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn serve(args: &Serve) -> Result<(), Failure> {
    harden();
    let attacher = Arc::new(Attacher::start(&args.state_dir)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(control(args, Arc::clone(&attacher)))?;
    attacher.stop();
    Ok(())
}

async fn control(args: &Serve, attacher: Arc<Attacher>) -> Result<(), Failure> {
    let listener = listen(&args.socket)?;
    if let Some(address) = args.http {
        let listener = TcpListener::bind(address).await?;
        tokio::spawn(http::serve(listener, Arc::clone(&attacher)));
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    info!(socket = %args.socket.display(), state_dir = %args.state_dir.display(), "serving");
    tonic::transport::Server::builder()
        .add_service(AttacherServer::new(Service::new(attacher)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
    let _ = std::fs::remove_file(&args.socket);
    Ok(())
}

/// A socket that an earlier process left is replaced; one that answers is not.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let text = format!("{} is served by another process", path.display());
        return Err(std::io::Error::other(text));
    }
    let _ = std::fs::remove_file(path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    UnixListener::bind(path)
}
