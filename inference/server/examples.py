"""Values of the examples in the API's description: one task, at every stage of its life."""

ITEM_ID = "01a1fe00-9773-7d06-8caf-18b1297a19fb"
GROUP_ID = "01a1fe00-9770-7f0e-b1d5-2c4a6e8f0b1d"
PHOTO_ID = "01a1fe00-9771-7a3c-9e5f-7b9d1f3a5c7e"
PHOTO_PATH = f"{GROUP_ID}/{PHOTO_ID}_original.jpg"
VIDEO_PATH = f"videos/{ITEM_ID}.mp4"
OF_A_LEASE = {"item_id": ITEM_ID, "worker_id": "worker-1.5f3a"}

TASK = {
    "id": ITEM_ID,
    "group_id": GROUP_ID,
    "photo_id": PHOTO_ID,
    "prompt": "slow dolly-in",
    "seconds": 5.0,
    "inference_provider": None,
    "status": "completed",
    "progress": None,
    "cancel_requested": False,
    "retry_count": 0,
    "crash_count": 0,
    "worker_id": "worker-1.5f3a",
    "leased_until": None,
    "error_message": None,
    "photo_storage_path": PHOTO_PATH,
    "photo_filename": "holiday.jpg",
    "video_storage_path": VIDEO_PATH,
    "video_url": f"https://i2v.example.com/storage/v1/object/sign/group-photos/{VIDEO_PATH}?token=…",
    "runway_task_id": None,
    "veo_operation_id": None,
    "cost_usd": 0.02,
    "eta_s": None,
    "created_at": "2026-01-31T12:00:00.000Z",
    "updated_at": "2026-01-31T12:01:07.000Z",
    "started_at": "2026-01-31T12:00:02.000Z",
    "ended_at": "2026-01-31T12:01:07.000Z",
}

GROUP = {
    "id": GROUP_ID,
    "name": "summer",
    "status": "processing",
    "counts": {"pending": 3, "processing": 1, "completed": 8},  # a status without tasks is left out
    "left_s": 95.0,
    "created_at": "2026-01-31T12:00:00.000Z",
}
